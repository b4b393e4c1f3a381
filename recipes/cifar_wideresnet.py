"""WRN-28-10 on CIFAR-100 with GradAug (arXiv 2006.07989), or with another method of its table.

    accelerate launch recipes/cifar_wideresnet.py
    accelerate launch recipes/cifar_wideresnet.py --method baseline --seed 1
    accelerate launch recipes/cifar_wideresnet.py --model wrn16_2 --dataset_name uoft-cs/cifar10 --labels_per_class 100

Prints the accuracy after the final epoch, and writes the model and `results.json` to --output_dir.
Tested on 2 CPU cores, for a few steps.
"""

from gradaug_hf.experiments.recipes import CIFAR_WIDERESNET as RECIPE
from gradaug_hf.experiments.run import run

if __name__ == "__main__":
    run(RECIPE)
