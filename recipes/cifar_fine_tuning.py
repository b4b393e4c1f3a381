"""Fine-tune a pretrained model on a few labels of CIFAR-10 at 64 pixels, with GradAug or another method.

    accelerate launch recipes/cifar_fine_tuning.py
    accelerate launch recipes/cifar_fine_tuning.py --method baseline --labels_per_class 25 --seed 1

Prints the accuracy after the final epoch, and writes the model and `results.json` to --output_dir.
Tested on 2 CPU cores.
"""

from gradaug_hf.experiments.recipes import CIFAR_FINE_TUNING as RECIPE
from gradaug_hf.experiments.run import run

if __name__ == "__main__":
    run(RECIPE)
