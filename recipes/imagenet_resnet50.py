"""ResNet-50 on ImageNet with GradAug (arXiv 2006.07989), or with another method of its table.

    accelerate launch recipes/imagenet_resnet50.py
    accelerate launch recipes/imagenet_resnet50.py --method gradaug_cutmix --streaming --bf16
    accelerate launch recipes/imagenet_resnet50.py run.yaml
    accelerate launch recipes/imagenet_resnet50.py --do_train false --do_eval --model timm/resnet50.a1_in1k

Prints the accuracy after the final epoch, and writes the network and `results.json` to --output_dir. The images are
those of the Hub's ILSVRC/imagenet-1k, whose terms have to be accepted there first; `hf auth login` signs in.
Tested on 2 CPU cores, for a few steps.
"""

from timm.models import ResNet
from torch import nn

from gradaug_hf.data.transforms import imagenet_transform
from gradaug_hf.experiments.methods import methods_with
from gradaug_hf.experiments.run import Recipe, run


def initialise(network: nn.Module) -> None:
    """The paper's normal(0, 0.01) in the classifier; timm draws the convolutions as the paper does."""
    if isinstance(network, ResNet):
        nn.init.normal_(network.fc.weight, std=0.01)
        nn.init.zeros_(network.fc.bias)


RECIPE = Recipe(
    description=__doc__,
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
    initialise=initialise,
)

if __name__ == "__main__":
    run(RECIPE)
