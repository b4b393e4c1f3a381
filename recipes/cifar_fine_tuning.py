"""Fine-tune a pretrained model on a few labels of CIFAR-10 at 64 pixels, with GradAug or another method.

    accelerate launch recipes/cifar_fine_tuning.py
    accelerate launch recipes/cifar_fine_tuning.py --method baseline --labels_per_class 25 --seed 1

Prints the accuracy after the final epoch, and writes the model and `results.json` to --output_dir.
Tested on 2 CPU cores.
"""

from functools import partial

from gradaug_hf.data.loading import cifar_transform
from gradaug_hf.experiments.methods import methods_with
from gradaug_hf.experiments.run import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    settings={
        "model": "timm/tf_efficientnet_lite0.in1k",
        "dataset_name": "uoft-cs/cifar10",
        "labels_per_class": 10,
        "num_train_epochs": 30,
        "batch_size": 20,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "num_subnets": 3,
        "min_width": 0.9,
        "resolutions": [64, 56, 48],
    },
    methods=methods_with(),
    transform=partial(cifar_transform, size=64),
)

if __name__ == "__main__":
    run(RECIPE)
