"""Does GradAug help with few labels? Every method of the recipes, with several numbers of labels and seeds.

    python recipes/low_data.py
    python recipes/low_data.py --labels 1000 --methods baseline gradaug --seeds 0 1 2 3 4
    python recipes/low_data.py --dataset_name DIR --recipe recipes/imagenet_resnet50.py --model resnet18 --labels 0

The labels are balanced and sampled with the seed; accuracy is that on all test images after the final epoch. A
baseline with as many multiply-adds as GradAug is always among the rows, and paired differences with a verdict follow.
Each run is a process of its own; started again, finished runs are skipped. Further flags are those of the recipe that
trains. Tested on 2 CPU cores, at reduced size.
"""

from gradaug_hf.experiments.low_data import main

if __name__ == "__main__":
    main(__doc__)
