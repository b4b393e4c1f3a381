"""ResNet-110 on CIFAR-10 with GradAug whose sub-networks drop blocks at random (arXiv 2006.07989).

    accelerate launch recipes/cifar_resnet110_depth.py
    accelerate launch recipes/cifar_resnet110_depth.py --dataset_name uoft-cs/cifar100
    accelerate launch recipes/cifar_resnet110_depth.py --method stochdepth --seed 1

Prints the accuracy after the final epoch, and writes the network and `results.json` to --output_dir.
Tested on 2 CPU cores, for a few steps.
"""

from gradaug_hf.data.transforms import cifar_transform
from gradaug_hf.experiments.methods import methods_with
from gradaug_hf.experiments.run import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    settings={
        "model": "resnet110_cifar",
        "dataset_name": "uoft-cs/cifar10",
        "num_train_epochs": 200,
        "batch_size": 128,
        "learning_rate": 0.1,
        "weight_decay": 1e-4,
        "num_subnets": 3,
        "subnet_mode": "depth",
        "min_survival": 0.8,
        "resolutions": [32, 28, 24],
    },
    methods=methods_with(),
    transform=cifar_transform,
)

if __name__ == "__main__":
    run(RECIPE)
