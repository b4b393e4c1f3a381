"""PyramidNet-200 (alpha 240) on CIFAR-100 with GradAug (arXiv 2006.07989), or with another method of its table.

    accelerate launch recipes/cifar_pyramidnet.py
    accelerate launch recipes/cifar_pyramidnet.py --method gradaug_cutmix
    accelerate launch recipes/cifar_pyramidnet.py --method shakedrop --seed 1

Prints the accuracy after the final epoch, and writes the network and `results.json` to --output_dir.
Tested on 2 CPU cores, for a few steps.
"""

from gradaug_hf.data.transforms import cifar_transform
from gradaug_hf.experiments.methods import methods_with
from gradaug_hf.experiments.run import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    settings={
        "model": "pyramidnet200_a240",
        "dataset_name": "uoft-cs/cifar100",
        "num_train_epochs": 300,
        "batch_size": 64,
        "learning_rate": 0.25,
        "lr_drops": [150 / 300, 225 / 300],
        "weight_decay": 1e-4,
        "num_subnets": 3,
        "min_width": 0.8,
        "resolutions": [32, 28, 24],
    },
    methods=methods_with(),
    transform=cifar_transform,
)

if __name__ == "__main__":
    run(RECIPE)
