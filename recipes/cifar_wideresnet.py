"""WRN-28-10 on CIFAR-100 with GradAug (arXiv 2006.07989), or with another method of its table.

    accelerate launch recipes/cifar_wideresnet.py
    accelerate launch recipes/cifar_wideresnet.py --method baseline --seed 1
    accelerate launch recipes/cifar_wideresnet.py --model wrn16_2 --dataset_name uoft-cs/cifar10 --labels_per_class 100

Prints the accuracy after the final epoch, and writes the network and `results.json` to --output_dir.
Tested on 2 CPU cores, for a few steps.
"""

from gradaug_hf.data.transforms import cifar_transform
from gradaug_hf.experiments.methods import methods_with
from gradaug_hf.experiments.run import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    settings={
        "model": "wrn28_10",
        "dataset_name": "uoft-cs/cifar100",
        "num_train_epochs": 200,
        "batch_size": 128,
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "num_subnets": 3,
        "min_width": 0.8,
        "resolutions": [32, 28, 24],
    },
    methods=methods_with(),
    transform=cifar_transform,
)

if __name__ == "__main__":
    run(RECIPE)
