"""Command line of the recipes: flags, a YAML or JSON file, and defaults that a recipe and a method set."""

import json
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from gradaug_hf.experiments.methods import METHODS, check_flags, concerns_subnets, trains_plainly
from gradaug_hf.experiments.presets import PRESETS, preset_settings
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.utils.command_line import BriefParser

USAGE = "[SETTINGS.yaml] [--FLAG VALUE ...]"
FILE_ENDINGS = (".yaml", ".yml", ".json")
EMPTY = (None, [])
TRAINER_FIELDS = {f.name for f in fields(TrainingArguments)}
# A given setting, on the left, takes the place of one of recipe, method or preset that says the same in another way.
GIVES_WAY = {"warmup_steps": ("warmup_epochs", 0.0), "lr_scheduler_type": ("lr_drops", []), "fp16": ("bf16", False)}


class CheckedArguments:
    """Arguments of a recipe that name the field that is out of its range."""

    def _check(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")

    def _check_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._check(name, value is None or value >= least, f"at least {least}")

    def _check_texts(self) -> None:
        for name, value in vars(self).items():
            self._check(name, not (isinstance(value, str) and not value.strip()), "a text that is not empty")


@dataclass
class DataArguments(CheckedArguments):
    """Columns, splits and number of the images that a recipe loads."""

    dataset_config_name: str | None = HfArg(default=None, help="Configuration of a Hub dataset that has several.")
    image_column: str | None = HfArg(default=None, help="Column of images; found if not given.")
    label_column: str | None = HfArg(default=None, help="Column of classes; found if not given.")
    train_split: str = HfArg(default="train", help="Split of the training images.")
    eval_split: str | None = HfArg(default=None, help="Split to evaluate on; by default `validation`, else `test`.")
    max_eval_samples: int | None = HfArg(
        default=None, help="Number of images to evaluate on, sampled with the seed; default: all."
    )

    def __post_init__(self) -> None:
        self._check_least(1, "max_eval_samples")

    def loading_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `load_image_data` and `stream_image_data`."""
        return {
            "config_name": self.dataset_config_name,
            "train_split": self.train_split,
            "eval_split": self.eval_split,
            "image_column": self.image_column,
            "label_column": self.label_column,
        }


@dataclass
class TrainingDataArguments(DataArguments):
    """Images to train on, beside those to evaluate on."""

    max_train_samples: int | None = HfArg(
        default=None, help="Number of training images, sampled with the seed; default: all."
    )
    skip_bad_images: bool = HfArg(
        default=False, help="Whether to leave out, and count, images that cannot be decoded instead of stopping."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "max_train_samples")


@dataclass
class ScheduleArguments(CheckedArguments):
    """Batch and learning rate of a training."""

    batch_size: int = HfArg(
        default=128, help="Images in an optimiser step, over all processes and accumulated batches."
    )
    warmup_epochs: float = HfArg(
        default=0.0, help="Epochs in which the learning rate rises linearly to its highest value."
    )
    lr_drops: list[float] = HfArg(
        default_factory=list,
        help="Shares of the training, in (0, 1), after which the learning rate is a tenth of what it was.",
    )

    overwrite_output_dir: bool = HfArg(
        default=False, help="Whether to write over the results of another run in output_dir."
    )

    def __post_init__(self) -> None:
        self._check_least(1, "batch_size")
        self._check("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "at least 0 and finite")
        self._check("lr_drops", all(0 < share < 1 for share in self.lr_drops), "a list of shares in (0, 1)")


@dataclass
class ExperimentArguments(ScheduleArguments, TrainingDataArguments):
    """Arguments of a recipe that trains a classifier, beside those of GradAugConfig."""

    method: str = HfArg(
        default="gradaug",
        help="Regularisation to train with; flags that are given win over it.",
        metadata={"choices": list(METHODS)},
    )
    preset: str = HfArg(
        default="exact",
        help='"exact" trains with the arithmetic of the paper; "fast" with channels-last memory, bfloat16 where '
        'the device computes in it, channel counts that are multiples of 8, and five widths; "light" as "fast", '
        "with sub-networks of fewer residual blocks, each on its own quarter of the batch, for about 1.5 times the "
        "arithmetic of plain training. Flags and the file win over it.",
        metadata={"choices": list(PRESETS)},
    )
    model: str = HfArg(
        default="resnet50",
        help="Name of a timm model, which is trained from scratch; or a Hub id, as user/name or "
        "user/name@revision, or a folder, of timm or transformers, whose weights are loaded.",
    )
    drop_path_rate: float | None = HfArg(
        default=None, help="Probability with which stochastic depth drops the last block."
    )
    drop_block_rate: float | None = HfArg(default=None, help="Probability of DropBlock.")
    shake_drop_rate: float | None = HfArg(default=None, help="Probability with which ShakeDrop shakes the last block.")
    zero_init_last: bool | None = HfArg(default=None, help="Whether the last batch norm of each block starts at zero.")
    dataset_name: str = HfArg(
        default="ILSVRC/imagenet-1k",
        help="Hub id, parquet file, folder of parquet files, of tar archives or of images sorted by class.",
    )
    class_map: str | None = HfArg(
        default=None,
        help="File with the names of the classes, for datasets that hold their numbers or names alone: text with a "
        "name on each line, or JSON, a list or an object that numbers them.",
    )
    labels_per_class: int | None = HfArg(
        default=None, help="Training images of each class, sampled with the seed; default: all."
    )
    streaming: bool = HfArg(
        default=False, help="Whether to read the images while training instead of downloading first."
    )
    subnet_rotation: bool = HfArg(
        default=False, help="Whether each sub-network sees the images turned by 0, 90, 180 or 270 degrees."
    )

    def __post_init__(self) -> None:
        TrainingDataArguments.__post_init__(self)
        ScheduleArguments.__post_init__(self)
        self._check_texts()
        self._check_least(1, "labels_per_class")
        for name in ("drop_path_rate", "drop_block_rate", "shake_drop_rate"):
            self._check(name, 0 <= (getattr(self, name) or 0) < 1, "in [0, 1)")
        self._check("skip_bad_images", not (self.skip_bad_images and self.streaming), "False with streaming")


class RecipeParser(BriefParser, HfArgumentParser):
    """Parser of the flags of a recipe, whose help has the recipe's, then GradAug's, then the Trainer's."""

    def __init__(self, kinds: Any, **kwargs: Any) -> None:
        super().__init__(kinds, allow_abbrev=False, **kwargs)

    def parse_args_into_dataclasses(
        self, args: Sequence[str] | None = None, return_remaining_strings: bool = False, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Parse flags as HfArgumentParser does, and refuse in one line those that are not known."""
        *found, unknown = super().parse_args_into_dataclasses(args, return_remaining_strings=True, **kwargs)
        if return_remaining_strings:
            return *found, unknown
        self.refuse(unknown)
        return tuple(found)

    def _add_dataclass_arguments(self, dtype: type) -> None:
        is_config = issubclass(dtype, TrainingArguments)
        titles = ("GradAug", "the Trainer of transformers") if is_config else (getattr(dtype, "title", "the recipe"),)
        self._groups = [self.add_argument_group(title) for title in titles]
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser: ArgumentParser, field: Field) -> None:
        super()._parse_dataclass_field(self._groups[-1 if field.name in TRAINER_FIELDS else 0], field)


def parse(
    settings: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    description: str | None,
    argv: Sequence[str],
) -> tuple[ExperimentArguments, GradAugConfig]:
    """Return the arguments of a run: flags, then the file, preset, method and recipe, then the classes' defaults.

    Args:
        settings: what the recipe sets, by name of the field.
        methods: what each method sets.
        description: shown by --help.
        argv: flags, after the name of a YAML or JSON file if there is one.

    Raises:
        ValueError: a setting is out of its range or contradicts the method, or the file is not one of settings.
        SystemExit: a flag is not known, or its value has a wrong type.
    """
    parser = RecipeParser((ExperimentArguments, GradAugConfig), description=description, usage=USAGE)
    given = given_settings(parser, settings, argv)
    method = given.get("method", settings.get("method", ExperimentArguments.method))
    check_flags(method, methods, given)
    chosen = {**settings, **methods[method], **given, "method": method}
    preset = preset_settings(chosen.get("preset", ExperimentArguments.preset), chosen.get("use_cpu", False))
    if trains_plainly(methods[method]):
        preset = {name: value for name, value in preset.items() if not concerns_subnets(name)}
    chosen = {**settings, **methods[method], **preset, **given, "method": method}
    if chosen.get("output_dir") is None:
        model, seed = chosen.get("model", ExperimentArguments.model), chosen.get("seed", GradAugConfig.seed)
        chosen["output_dir"] = folder_of_run(model, method, seed)
    return parser.parse_dict(chosen)


def folder_of_run(model: str, method: str, seed: int) -> str:
    """Return the folder of a run for which none is named."""
    return str(Path("outputs") / f"{Path(model).name}-{method}-seed{seed}")


def given_settings(parser: HfArgumentParser, settings: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings of flags and a file, and those that give way to them, by name of the field.

    Args:
        parser: knows the fields.
        settings: what the recipe sets, for --help.
        argv: flags, after the name of a YAML or JSON file if there is one.
    """
    parser.set_defaults(**settings)
    from_file = {}
    if argv and argv[0].endswith(FILE_ENDINGS):
        from_file, argv = _read_settings(argv[0], _names(parser)), argv[1:]
    given = _given(parser, [*as_flags(from_file), *argv])
    given = _empty_settings(parser, from_file) | given
    if "per_device_train_batch_size" in given:
        raise ValueError("per_device_train_batch_size follows from batch_size, the images in a step; set that instead")
    return dict(GIVES_WAY[name] for name in given if name in GIVES_WAY) | given


def _names(parser: HfArgumentParser) -> list[str]:
    return [f.name for kind in parser.dataclass_types for f in fields(kind) if f.init]


def _given(parser: HfArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return the values of the flags that are given, of the right types."""
    absent = object()
    parsed = parser.parse_args(argv, Namespace(**dict.fromkeys(_names(parser), absent)))
    return {name: value for name, value in vars(parsed).items() if value is not absent}


def read_yaml(file: Path) -> Any:
    """Return what a file holds as YAML or JSON, which is YAML as well; raise a ValueError if it cannot be read."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read as YAML or JSON: {error}") from error


def _read_settings(file: str, known: Sequence[str]) -> dict[str, Any]:
    content = read_yaml(Path(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected settings by name, such as `seed: 1`")
    if unknown := sorted(str(name) for name in content if name not in known):
        raise ValueError(f"{file} sets {', '.join(unknown)}, which is no setting; --help lists them")
    return content


def _empty_settings(parser: HfArgumentParser, from_file: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's settings that are null or [], which no flag can say; raise a ValueError if one needs a value."""
    empty = {name: value for name, value in from_file.items() if value in EMPTY}
    types = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    for name, value in empty.items():
        wanted = (types[name], *get_args(types[name]))
        if (type(None) if value is None else list) not in (*wanted, *map(get_origin, wanted)):
            raise ValueError(f"{name} is {'null' if value is None else '[]'} in the file; it must have a value")
    return empty


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as flags, without those that are empty.

    A file's values are thereby read as those of the command line are, 1e-4 for example.
    """
    flags = []
    for name, value in settings.items():
        if value not in EMPTY:
            words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, words)]
    return flags
