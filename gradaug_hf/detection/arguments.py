"""Command line of the detection recipe."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser

from gradaug_hf.detection.detector import DETECTORS
from gradaug_hf.experiments.arguments import given_settings
from gradaug_hf.trainer.config import GradAugConfig


@dataclass
class DetectionArguments:
    """What the recipe needs to know beside GradAugConfig.

    Raises:
        ValueError: a field is out of its range.
    """

    detector: str = field(
        default="mask_rcnn",
        metadata={"help": "Faster R-CNN finds boxes, Mask R-CNN boxes and masks.", "choices": list(DETECTORS)},
    )
    gradaug: bool = field(
        default=False,
        metadata={"help": "Whether sub-networks of the backbone learn as well, num_subnets in each step."},
    )
    backbone: str = field(
        default="resnet50",
        metadata={
            "help": (
                "Name of a timm network, which is trained from scratch; or a Hub id or a folder of timm or "
                "transformers, for example one that GradAug has trained, whose weights are loaded."
            )
        },
    )
    backbone_args: str = field(
        default="{}",
        metadata={"help": 'Arguments of the backbone\'s constructor as JSON, for example {"dynamic_img_size": true}.'},
    )
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a trained detector to evaluate, without training."}
    )
    coco_dir: str = field(
        default="coco",
        metadata={"help": "Folder of COCO or of other images with annotations in its format."},
    )
    train_annotations: str = field(
        default="annotations/instances_train2017.json",
        metadata={"help": "Annotations of the images to train on, below coco_dir."},
    )
    val_annotations: str = field(
        default="annotations/instances_val2017.json",
        metadata={"help": "Annotations of the images to evaluate on, below coco_dir."},
    )
    train_images: str | None = field(
        default=None,
        metadata={
            "help": (
                "Folder of the images to train on, below coco_dir; default: `train2017` or `images/train2017` for "
                "annotations named `..._train2017.json`."
            )
        },
    )
    val_images: str | None = field(
        default=None, metadata={"help": "Folder of the images to evaluate on, below coco_dir; found likewise."}
    )
    min_size: int = field(default=800, metadata={"help": "Shorter side in pixels that images are resized to."})
    max_size: int = field(default=1333, metadata={"help": "Longest side in pixels, which no image exceeds."})
    anchor_scale: float = field(default=8.0, metadata={"help": "Sides of a level's anchors over its stride."})
    channels: int = field(default=256, metadata={"help": "Channels of the feature pyramid and of the mask head."})
    box_head_size: int = field(default=1024, metadata={"help": "Size of the two layers of the box head."})
    rois_per_image: int = field(
        default=512, metadata={"help": "Proposals of an image that box and mask head are trained on."}
    )
    flip: float = field(default=0.5, metadata={"help": "Probability with which an image is flipped, in [0, 1]."})
    batch_size: int = field(
        default=16,
        metadata={"help": "Images in an optimiser step, over all processes and accumulated batches."},
    )
    warmup_epochs: float = field(
        default=0.0, metadata={"help": "Epochs in which the learning rate rises linearly to its highest value."}
    )
    lr_drops: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Shares of the training, in (0, 1), after which the learning rate is a tenth of what it was."
        },
    )

    def __post_init__(self) -> None:
        self._check("flip", 0 <= self.flip <= 1, "in [0, 1]")
        self._check("batch_size", self.batch_size >= 1, "at least 1")
        self._check("warmup_epochs", self.warmup_epochs >= 0, "at least 0")
        self._check("lr_drops", all(0 < share < 1 for share in self.lr_drops), "a list of shares in (0, 1)")
        try:
            self._check("backbone_args", isinstance(json.loads(self.backbone_args), dict), "a JSON object")
        except json.JSONDecodeError as error:
            raise ValueError(f"backbone_args is {self.backbone_args!r}; it must be a JSON object") from error

    def _check(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")


def parse(
    settings: Mapping[str, Any], description: str | None, argv: Sequence[str]
) -> tuple[DetectionArguments, GradAugConfig]:
    """The arguments of a run: flags, then the file, then the recipe, then the classes' defaults.

    Args:
        settings: what the recipe sets, by name of the field.
        description: shown by --help.
        argv: flags, after the name of a YAML or JSON file if there is one.

    Raises:
        ValueError: a setting is out of its range, or the file is not one of settings.
        SystemExit: a flag is not known, or its value has a wrong type.
    """
    parser = HfArgumentParser((DetectionArguments, GradAugConfig), description=description)
    args, config = parser.parse_dict({**settings, **given_settings(parser, settings, argv)})
    if not args.gradaug:
        config.num_subnets = 0
    return args, config
