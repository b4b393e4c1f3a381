"""Plain training, plain training at equal compute and GradAug on a few labelled images, with five seeds.

    accelerate launch recipes/quickstart.py
    accelerate launch recipes/quickstart.py --dataset_name uoft-cs/cifar10 --image_size 32 --model wrn16_2 \\
        --labels_per_class 100 --epochs 60 --output_dir outputs/cifar10

Without --dataset_name it trains on scikit-learn's handwritten digits. It prints the accuracy of each run, then a table
of means, deviations and paired differences with a verdict, and writes them to --output_dir with a plot and GradAug's
checkpoint of the first seed. It loads that with timm in a new process to measure its accuracy again. Interrupted and
started again, it goes on behind the last run that was finished. Tested on 2 CPU cores.
"""

from gradaug_hf.experiments.quickstart import main

if __name__ == "__main__":
    main(__doc__)
