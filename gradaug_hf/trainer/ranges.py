"""Ranges of the settings of a training, checked before anything is loaded."""

import math
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from transformers import TrainingArguments

# Side in pixels; that of an image of 150 MB in float32.
LARGEST_SIDE = 4096
# Settings of a training that have to be at least a number.
AT_LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "num_train_epochs": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "adam_epsilon": 0,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
}
# To measure the gradient without clipping it.
MAY_BE_INFINITE = ("max_grad_norm",)


def check_ranges(args: TrainingArguments, kind: type[TrainingArguments]) -> None:
    """Raise a ValueError if a setting of a training is missing, not finite, too small or too large.

    Args:
        args: the settings.
        kind: the class whose fields are checked; those of a subclass are its own matter.
    """
    hints, trainers = get_type_hints(kind), {f.name for f in fields(TrainingArguments)}
    for f in fields(kind):
        value = getattr(args, f.name)
        if value is None and f.name not in trainers and NoneType not in get_args(hints[f.name]):
            refuse(f.name, value, "given")
        if isinstance(value, float) and not math.isfinite(value) and f.name not in MAY_BE_INFINITE:
            refuse(f.name, value, "finite")
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if value is None or (isinstance(value, (int, float)) and not value >= least):
            refuse(name, value, f"at least {least}")
    if not 0 <= args.label_smoothing_factor < 1:
        refuse("label_smoothing_factor", args.label_smoothing_factor, "in [0, 1)")
    if isinstance(args.output_dir, str) and not args.output_dir.strip():
        refuse("output_dir", args.output_dir, "the name of a folder")


def check_side(name: str, side: Any) -> None:
    """Raise a ValueError if the side of images is so large that memory does not hold them."""
    if isinstance(side, int) and side > LARGEST_SIDE:
        refuse(name, side, f"at most {LARGEST_SIDE} pixels")


def refuse(name: str, value: Any, allowed: str) -> None:
    """Raise a ValueError that names a setting, its value and what is allowed."""
    raise ValueError(f"{name} is {value!r}; it must be {allowed}")
