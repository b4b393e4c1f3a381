"""Errors of trained models under the fast gradient sign method (FGSM) and ImageNet-C's 15 common corruptions.

    accelerate launch recipes/robustness.py --dataset_name uoft-cs/cifar100 \\
        --model outputs/wrn28_10-baseline-seed42 --model outputs/wrn28_10-gradaug-seed42 \\
        --baseline outputs/wrn28_10-baseline-seed42
    accelerate launch recipes/robustness.py --dataset_name ILSVRC/imagenet-1k --model timm/resnet50.a1_in1k

All models see the same pixels. Prints a table of top-1 errors, and writes `robustness.json` and `robustness.png` to
--output_dir. Started again, it goes on where it was interrupted. Tested on 2 CPU cores, with a few hundred images.
"""

from gradaug_hf.experiments.evaluation.robustness import main

if __name__ == "__main__":
    main(__doc__)
