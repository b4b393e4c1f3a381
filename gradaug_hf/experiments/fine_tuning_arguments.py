"""Command line of fine-tuning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers.hf_argparser import HfArg

from gradaug_hf.data.backbone_transforms import AUGMENTATIONS
from gradaug_hf.experiments.arguments import (
    USAGE,
    CheckedArguments,
    RecipeParser,
    ScheduleArguments,
    TrainingDataArguments,
    given_settings,
)
from gradaug_hf.experiments.run import SETTINGS
from gradaug_hf.experiments.sweep import LAUNCH
from gradaug_hf.hub.preprocessing import SMALL_CROP
from gradaug_hf.trainer.config import GradAugConfig

DESCRIPTION = (
    "Fine-tune a pretrained model on photos of your own, with GradAug, or plainly with --num_subnets 0. Prints the "
    "accuracy after the final epoch and of each class, and writes the model, results.json, classes.csv and plots to "
    "--output_dir. With --compare it trains in both ways with several seeds, and says whether GradAug helps."
)
BATCH_SIZE = 32
# Learning rate of a batch of so many images; AdamW's grows with the root of the batch (arXiv 2205.10287). With a few
# hundred photos there are few steps, in which a new classifier learns too little at a lower one; layer_decay spares
# the pretrained layers.
LEARNING_RATE = 5e-4
# Flags that recipes/imagenet_resnet50.py has and this one has not.
ELSEWHERE = {
    "--streaming": "it counts the photos of each class first and shows the worst mistakes at the end; leave streaming "
    "out, or train the model on a stream with recipes/imagenet_resnet50.py --streaming --model, by its id on the Hub "
    "or its folder"
}
FINE_TUNING = SETTINGS | {
    "num_train_epochs": 10,
    "optim": "adamw_torch",
    "learning_rate": LEARNING_RATE,
    "weight_decay": 0.05,
    "warmup_steps": 0.1,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.1,
    "num_subnets": 1,
    "min_width": 0.9,
    "kl_warmup": 1 / 3,
    "channels_last": True,
}


@dataclass(kw_only=True)
class FineTuningArguments(ScheduleArguments, TrainingDataArguments):
    """Arguments of fine-tuning, beside those of GradAugConfig."""

    model: str = HfArg(
        aliases=["--model_name_or_path"],
        help="Model with pretrained weights: name of a timm model, Hub id as user/name or user/name@revision, or "
        "folder, of timm or transformers.",
    )
    dataset_name: str | None = HfArg(
        default=None,
        help="Hub id, parquet file, folder of parquet files, or folder of photos sorted by class. A fifth of each "
        "class is held out for evaluation where there is no other split.",
    )
    train_dir: str | None = HfArg(
        default=None, help="Folder of photos to train on, sorted by class; instead of dataset_name."
    )
    validation_dir: str | None = HfArg(
        default=None, help="Folder of photos to evaluate on, sorted by class, beside train_dir."
    )
    image_column: str | None = HfArg(
        default=None, aliases=["--image_column_name"], help="Column of images; found if not given."
    )
    label_column: str | None = HfArg(
        default=None, aliases=["--label_column_name"], help="Column of classes; found if not given."
    )
    image_size: int | None = HfArg(
        default=None, help="Side in pixels of the images; default: that of the pretrained model."
    )
    crop_pct: float | None = HfArg(
        default=None,
        help="Share of a photo's short side that evaluation and prediction keep, from the centre, in (0, 1]. Default: "
        f"that of the pretrained model, or at most {SMALL_CROP} where image_size is below its own.",
    )
    batch_size: int = HfArg(
        default=BATCH_SIZE,
        help="Images in an optimiser step, over all processes and accumulated batches. The learning rate is "
        f"{LEARNING_RATE:g} times the square root of batch_size / {BATCH_SIZE} unless learning_rate is given.",
    )
    layer_decay: float = HfArg(
        default=0.75,
        help="Factor of the learning rate from each layer to the one before it, in (0, 1]; the classifier has all "
        "of it, and 1 gives it to all layers.",
    )
    freeze: Literal["none", "batch_norm", "backbone"] = HfArg(
        default="batch_norm",
        help='Part that is not trained; "batch_norm": the statistics of batch norm, which the pretrained model '
        'measured on more images, "backbone": all but the classifier, and without sub-networks.',
    )
    lora_rank: int | None = HfArg(
        default=None,
        help="Rank of adapters of peft, which are trained with norms and classifier instead of the whole backbone, "
        "and merged into what is saved. Default: no adapters.",
    )
    class_weights: Literal["none", "balanced"] = HfArg(
        default="none",
        help='Weights of the classes in the loss; "balanced" counts each the same, however many images it has.',
    )
    ema_decay: float | None = HfArg(
        default=None,
        help="Decay in (0, 1) of a moving average of the weights, which is evaluated and saved instead of them, "
        "0.999 for example; it starts lower and rises with the steps. Default: no average.",
    )
    hflip: float = HfArg(default=0.5, help="Probability of a flip; 0 where left and right matter, as for letters.")
    auto_augment: str | None = HfArg(
        default=None, help=f"timm's policy of augmentation: {AUGMENTATIONS}. Default: none."
    )
    random_erasing: float = HfArg(
        default=0.0, help="Probability with which a rectangle of a training image becomes noise."
    )
    preview: bool = HfArg(
        default=False, help="Whether to stop once plots/examples.png shows what the model would be trained on."
    )
    method: str = field(default="gradaug", init=False)  # the run's name in tables of results

    def __post_init__(self) -> None:
        TrainingDataArguments.__post_init__(self)
        ScheduleArguments.__post_init__(self)
        self._check_texts()
        self._check_source()
        self._check_least(1, "image_size", "lora_rank")
        self._check("layer_decay", 0 < self.layer_decay <= 1, "in (0, 1]")
        self._check("crop_pct", self.crop_pct is None or 0 < self.crop_pct <= 1, "in (0, 1]")
        self._check("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "in (0, 1)")
        for name in ("hflip", "random_erasing"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check(
            "lora_rank", self.lora_rank is None or self.freeze != "backbone", "left out with freeze 'backbone'"
        )
        for name, choices in (("freeze", ("none", "batch_norm", "backbone")), ("class_weights", ("none", "balanced"))):
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}")

    def _check_source(self) -> None:
        if (self.dataset_name is None) == (self.train_dir is None):
            found = "neither is given" if self.dataset_name is None else "both are given"
            raise ValueError(f"dataset_name or train_dir names the photos to train on, but {found}; give one of them")
        if self.validation_dir is not None and self.train_dir is None:
            raise ValueError(
                f"validation_dir is {self.validation_dir!r} without train_dir; give that instead of dataset_name"
            )


@dataclass
class ComparisonArguments(CheckedArguments):
    """Arguments of a comparison of GradAug with plain training."""

    title = "a comparison"  # above them in --help

    compare: bool = HfArg(
        default=False,
        help="Whether to train plainly, plainly for as many multiply-adds as GradAug, and with GradAug, each with "
        "several seeds, and to compare them. Started again, finished runs are skipped, and one that was "
        "interrupted goes on.",
    )
    seeds: int = HfArg(default=3, help="Number of seeds of a comparison, from seed on.")
    labels: list[int] = HfArg(
        default_factory=list, help="Numbers of training images, sampled with the seed, to compare with; default: all."
    )
    launch: str = HfArg(default=LAUNCH, help="Command that starts each run of a comparison.")
    settings: dict[str, Any] = field(default_factory=dict, init=False)  # those that are given, of all runs

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_least(1, "seeds")
        self._check("labels", all(labels >= 1 for labels in self.labels), "a list of numbers of at least 1")


# Settings of a comparison, which its runs have not.
OF_COMPARISON = ("compare", "seeds", "labels", "launch")
# Settings that concern one training, and contradict a comparison where they are on.
OF_ONE_TRAINING = ("resume_from_checkpoint", "overwrite_output_dir", "preview", "push_to_hub")


def parse(argv: Sequence[str]) -> tuple[FineTuningArguments, GradAugConfig, ComparisonArguments]:
    """Return the arguments of a fine-tuning and of a comparison: flags, then the file, then the defaults.

    Args:
        argv: flags, after the name of a YAML or JSON file if there is one.

    Raises:
        ValueError: a setting is out of its range or contradicts another, or the file is not one of settings.
        SystemExit: a flag is missing or not known, or its value has a wrong type.
    """
    kinds = FineTuningArguments, ComparisonArguments, GradAugConfig
    parser = RecipeParser(kinds, description=DESCRIPTION, usage=USAGE)
    parser.elsewhere = ELSEWHERE
    given = given_settings(parser, FINE_TUNING, argv)
    _check_comparison(given)
    chosen: dict[str, Any] = {**FINE_TUNING, **given}
    batch_size = chosen.get("batch_size", BATCH_SIZE)
    if "learning_rate" not in given:
        chosen["learning_rate"] = LEARNING_RATE * math.sqrt(batch_size / BATCH_SIZE)
    if chosen.get("freeze") == "backbone":
        if given.get("num_subnets", 0) > 0:
            raise ValueError(
                f"freeze is 'backbone' and num_subnets is {given['num_subnets']}, but the sub-networks of a backbone "
                "that is not trained cannot learn; leave one of them out"
            )
        chosen["num_subnets"] = 0
    if chosen.get("output_dir") is None:
        chosen["output_dir"] = _folder_of(chosen)
    args, comparison, config = parser.parse_dict(chosen)
    args.method = "gradaug" if config.num_subnets > 0 else "plain"
    own = (*OF_COMPARISON, "output_dir", "seed")
    comparison.settings = {name: value for name, value in given.items() if name not in own}
    return args, config, comparison


def _check_comparison(given: dict[str, Any]) -> None:
    """Make sure that settings do not contradict a comparison, or its absence."""
    if not given.get("compare"):
        for name in OF_COMPARISON[1:]:
            if name in given:
                raise ValueError(f"{name} is {given[name]!r} without compare, which it is for; add --compare")
        return
    if given.get("freeze") == "backbone" or given.get("num_subnets") == 0:
        name = "freeze" if given.get("freeze") == "backbone" else "num_subnets"
        raise ValueError(
            f"{name} is {given[name]!r}, which trains without sub-networks, and compare is True, which compares them "
            "with plain training; leave one of them out"
        )
    for name in OF_ONE_TRAINING:
        if given.get(name):
            raise ValueError(
                f"{name} is {given[name]!r}, which concerns one training, and compare is True; leave one of them out. "
                "A comparison that is started again goes on where it was"
            )
    if "max_train_samples" in given and "labels" in given:
        raise ValueError("labels and max_train_samples are both given, and say the same; leave one of them out")


def _folder_of(chosen: dict[str, Any]) -> str:
    """Return the folder of a run for which none is named."""
    data = chosen.get("dataset_name") or chosen.get("train_dir") or "."
    last = "compared" if chosen.get("compare") else f"seed{chosen.get('seed', GradAugConfig.seed)}"
    names = Path(chosen["model"]).name, Path(data).resolve().name, last
    return str(Path("outputs") / "-".join(names))
