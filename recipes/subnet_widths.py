"""Accuracy and cost of the sub-networks of trained models, against their width.

    accelerate launch recipes/subnet_widths.py --dataset_name uoft-cs/cifar100 \\
        --model outputs/wrn28_10-baseline-seed42 --model outputs/wrn28_10-gradaug-seed42
    accelerate launch recipes/subnet_widths.py --dataset_name uoft-cs/cifar100 \\
        --model outputs/wrn28_10-gradaug-seed42 --export 0.75

Each width is evaluated as a dense model with batch norm recalibrated on training images; the full width is the
model as it was trained. Prints a table of accuracy, multiply-adds, parameters and latency on one CPU thread, and
writes `subnet_widths.json` and `subnet_widths.png` to --output_dir. Started again, it goes on where it was stopped.
Tested on 2 CPU cores, with a few hundred images.
"""

from gradaug_hf.experiments.evaluation.widths import main

if __name__ == "__main__":
    main(__doc__)
