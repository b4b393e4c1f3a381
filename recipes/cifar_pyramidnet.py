"""PyramidNet-200 (alpha 240) on CIFAR-100 with GradAug (arXiv 2006.07989), or with another method of its table.

    accelerate launch recipes/cifar_pyramidnet.py
    accelerate launch recipes/cifar_pyramidnet.py --method gradaug_cutmix
    accelerate launch recipes/cifar_pyramidnet.py --method shakedrop --seed 1

Prints the accuracy after the final epoch, and writes the model and `results.json` to --output_dir.
Tested on 2 CPU cores, for a few steps.
"""

from gradaug_hf.experiments.recipes import CIFAR_PYRAMIDNET as RECIPE
from gradaug_hf.experiments.run import run

if __name__ == "__main__":
    run(RECIPE)
