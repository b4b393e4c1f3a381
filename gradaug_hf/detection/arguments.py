"""Command line of the detection recipe."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from gradaug_hf.detection.detector import DetectorSettings
from gradaug_hf.experiments.arguments import USAGE, RecipeParser, ScheduleArguments, folder_of_run, given_settings
from gradaug_hf.experiments.methods import concerns_subnets
from gradaug_hf.trainer.config import GradAugConfig


@dataclass
class DetectionArguments(ScheduleArguments):
    """Arguments of the detection recipe, beside those of GradAugConfig."""

    gradaug: bool = HfArg(
        default=False, help="Whether sub-networks of the backbone learn as well, num_subnets in each step."
    )
    backbone: str = HfArg(
        default="resnet50",
        help="Name of a timm model, which is trained from scratch; or a Hub id or a folder of timm or "
        "transformers, for example one that GradAug has trained, whose weights are loaded.",
    )
    backbone_args: str = HfArg(
        default="{}", help='Arguments of the backbone\'s constructor as JSON, for example {"dynamic_img_size": true}.'
    )
    model: str | None = HfArg(
        default=None, help="Folder or Hub id of a trained detector to evaluate, without training."
    )
    coco_dir: str = HfArg(default="coco", help="Folder of COCO or of other images with annotations in its format.")
    train_annotations: str = HfArg(
        default="annotations/instances_train2017.json", help="Annotations of the images to train on, below coco_dir."
    )
    val_annotations: str = HfArg(
        default="annotations/instances_val2017.json", help="Annotations of the images to evaluate on, below coco_dir."
    )
    train_images: str | None = HfArg(
        default=None,
        help="Folder of the images to train on, below coco_dir; default: `train2017` or `images/train2017` for "
        "annotations named `..._train2017.json`.",
    )
    val_images: str | None = HfArg(
        default=None, help="Folder of the images to evaluate on, below coco_dir; found likewise."
    )
    flip: float = HfArg(default=0.5, help="Probability with which an image is flipped, in [0, 1].")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_texts()
        self._check("flip", 0 <= self.flip <= 1, "in [0, 1]")
        try:
            self._check("backbone_args", isinstance(json.loads(self.backbone_args), dict), "a JSON object")
        except json.JSONDecodeError as error:
            raise ValueError(f"backbone_args is {self.backbone_args!r}; it must be a JSON object") from error


def parse(
    settings: Mapping[str, Any], description: str | None, argv: Sequence[str]
) -> tuple[DetectionArguments, DetectorSettings, GradAugConfig]:
    """Return the arguments of a run: flags, then the file, then the recipe, then the classes' defaults.

    Raises:
        ValueError: a setting is out of its range or has no effect, or the file is not one of settings.
        SystemExit: a flag is not known, or its value has a wrong type.
    """
    parser = RecipeParser((DetectionArguments, DetectorSettings, GradAugConfig), description=description, usage=USAGE)
    given = given_settings(parser, settings, argv)
    if not given.get("gradaug"):
        if vain := [name for name, value in given.items() if concerns_subnets(name) and value not in (None, 0)]:
            raise ValueError(
                f"{', '.join(vain)} is given, but gradaug is False; give --gradaug as well, or leave it out"
            )
        given["num_subnets"] = 0
    elif given.get("num_subnets") == 0:
        raise ValueError("gradaug is True, but num_subnets is 0; leave one of them out")
    chosen = {**settings, **given}
    if chosen.get("output_dir") is None:
        kind = chosen.get("detector", DetectorSettings.detector)
        model = chosen.get("model") or chosen.get("backbone", DetectionArguments.backbone)
        method = "gradaug" if given.get("gradaug") else "plain"
        chosen["output_dir"] = folder_of_run(
            f"{kind}-{Path(model).name}", method, chosen.get("seed", GradAugConfig.seed)
        )
    return parser.parse_dict(chosen)
