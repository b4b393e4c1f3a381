"""ResNet-110 on CIFAR-10 with GradAug whose sub-networks drop blocks at random (arXiv 2006.07989).

    accelerate launch recipes/cifar_resnet110_depth.py
    accelerate launch recipes/cifar_resnet110_depth.py --dataset_name uoft-cs/cifar100
    accelerate launch recipes/cifar_resnet110_depth.py --method stochdepth --seed 1

Prints the accuracy after the final epoch, and writes the model and `results.json` to --output_dir.
Tested on 2 CPU cores, for a few steps.
"""

from gradaug_hf.experiments.recipes import CIFAR_RESNET110_DEPTH as RECIPE
from gradaug_hf.experiments.run import run

if __name__ == "__main__":
    run(RECIPE)
