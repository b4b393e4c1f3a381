"""The paper's experiments on classification, with its hyper-parameters (arXiv 2006.07989), and fine-tuning."""

from functools import partial

from timm.models import ResNet
from torch import nn

from gradaug_hf.data.transforms import cifar_transform, imagenet_transform
from gradaug_hf.experiments.methods import methods_with
from gradaug_hf.experiments.run import Recipe

ENDING = "Prints the accuracy after the final epoch, and writes the model and results.json to --output_dir."


def start_as_in_the_paper(model: nn.Module) -> None:
    """Give the classifier of a ResNet the paper's normal(0, 0.01); timm initialises convolutions as the paper does."""
    if isinstance(model, ResNet):
        nn.init.normal_(model.fc.weight, std=0.01)
        nn.init.zeros_(model.fc.bias)


IMAGENET_RESNET50 = Recipe(
    description=(
        f"ResNet-50 on ImageNet with GradAug, or with another method of the paper's table. {ENDING} The images are "
        "those of the Hub's ILSVRC/imagenet-1k, whose terms have to be accepted there first; `hf auth login` signs in."
    ),
    settings={
        "model": "resnet50",
        "zero_init_last": False,
        "dataset_name": "ILSVRC/imagenet-1k",
        "num_train_epochs": 120,
        "batch_size": 512,
        "learning_rate": 0.2,
        "weight_decay": 1e-4,
        "num_subnets": 3,
        "min_width": 0.9,
        "resolutions": [224, 192, 160, 128],
    },
    methods=methods_with(
        mixup={"mixup_alpha": 0.2, "num_train_epochs": 200},
        cutmix={"mix_prob": 1.0, "num_train_epochs": 300},
        stochdepth={"drop_path_rate": 0.2},
        bag_of_tricks={"model": "resnet50d", "num_train_epochs": 200},
        gradaug_cutmix={"mix_prob": 1.0, "num_train_epochs": 300},
        gradaug_mixup={"mixup_alpha": 0.2},
    ),
    transform=imagenet_transform,
    initialise=start_as_in_the_paper,
)

CIFAR_WIDERESNET = Recipe(
    description=f"WRN-28-10 on CIFAR-100 with GradAug, or with another method of the paper's table. {ENDING}",
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

CIFAR_PYRAMIDNET = Recipe(
    description=(
        f"PyramidNet-200 (alpha 240) on CIFAR-100 with GradAug, or with another method of the paper's table. {ENDING}"
    ),
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

CIFAR_RESNET110_DEPTH = Recipe(
    description=f"ResNet-110 on CIFAR-10 with GradAug whose sub-networks drop blocks at random. {ENDING}",
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

CIFAR_FINE_TUNING = Recipe(
    description=f"A pretrained model fine-tuned on a few labels of CIFAR-10 at 64 pixels, with GradAug. {ENDING}",
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

RECIPES = {
    "cifar_fine_tuning": CIFAR_FINE_TUNING,
    "cifar_pyramidnet": CIFAR_PYRAMIDNET,
    "cifar_resnet110_depth": CIFAR_RESNET110_DEPTH,
    "cifar_wideresnet": CIFAR_WIDERESNET,
    "imagenet_resnet50": IMAGENET_RESNET50,
}
