"""Checkpoints: written whole or not at all, with the settings of the training, and checked before they are read."""

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from gradaug_hf.hub.weights import WeightsError, has_types, read_json, read_pickle, weight_shapes
from gradaug_hf.trainer.config import GradAugConfig

STATE = "gradaug_state.json"
NUMBER = int | float
# Types of the progress in it, by name.
SUMS = {"loss": NUMBER, "total_loss": NUMBER, "last_logged": int, "means": {...: (NUMBER, str | NoneType, int)}}
PROGRESS = {"seconds": NUMBER, "stream": (NUMBER, NUMBER), "processes": [SUMS]}
CLASS_NAMES = "class_names"  # among the settings: those of the training set, where it names them
RESUME_ELSEWHERE = "resume from another checkpoint"
# Starts the name of a folder in which a checkpoint is being written. Nothing takes it for a checkpoint, and what
# begins with an underscore is never pushed.
PARTIAL = "_tmp-"
# Fields of `TrainingArguments` that change the weights that a training ends with.
SETTINGS_OF_TRAINING = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "dataloader_drop_last",
    "fp16",
    "gradient_accumulation_steps",
    "label_smoothing_factor",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "optim",
    "optim_args",
    "optim_target_modules",
    "per_device_train_batch_size",
    "seed",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
    "world_size",
)
# Those that say how long a training is.
LENGTHS = ("max_steps", "num_train_epochs")
# Own fields that do not change them.
OTHER_SETTINGS = ("eval_widths", "ignore_config_change")


class CheckpointError(OSError):
    """A checkpoint cannot be written; those before it are as they were."""


class ResumeError(ValueError):
    """A checkpoint cannot be read, or is not one of the training that is to go on from it."""


@contextmanager
def as_resume_errors() -> Iterator[None]:
    """Turn an error about a file of a checkpoint into a ResumeError."""
    try:
        yield
    except WeightsError as error:
        raise ResumeError(str(error)) from error


@contextmanager
def written_whole(run_dir: Path) -> Iterator[Path]:
    """Give a folder to write a checkpoint in, and remove it afterwards, whatever happens.

    It lies in `run_dir`, so that a checkpoint can be renamed from it into its place: a process that is killed leaves
    either no checkpoint of that name or a whole one.

    Raises:
        CheckpointError: something in it could not be written.
    """
    folder = run_dir / f"{PARTIAL}{PREFIX_CHECKPOINT_DIR}"
    try:
        yield folder
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are of torch.save and safetensors
        free = shutil.disk_usage(run_dir).free / 2**20
        raise CheckpointError(
            f"the checkpoint cannot be written to {run_dir}, which has {free:.0f} MiB free: {error}; "
            f"{describe_last(run_dir)}"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(checkpoint: Path, place: Path) -> None:
    """Rename a checkpoint that is whole, over one of the same step if there is one."""
    if place.exists():
        place.rename(checkpoint.parent / f"replaced-{place.name}")
    checkpoint.rename(place)


def place_once(checkpoint: Path, place: Path, accelerator: Accelerator) -> None:
    """Put a checkpoint that is whole in its place, once for all processes that share the folder; on all processes."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        put_in_place(checkpoint, place)
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process and checkpoint.exists():  # on a machine that does not share the folder
        put_in_place(checkpoint, place)
    accelerator.wait_for_everyone()


def remove_partial(run_dir: Path) -> None:
    """Remove what a process that was killed had begun to write."""
    shutil.rmtree(run_dir / f"{PARTIAL}{PREFIX_CHECKPOINT_DIR}", ignore_errors=True)


def describe_last(run_dir: Path) -> str:
    """Return a sentence on the checkpoint that a training can be resumed from."""
    last = get_last_checkpoint(run_dir) if run_dir.is_dir() else None
    return "there is no checkpoint before it" if last is None else f"the last checkpoint is {last}"


# ---- settings and progress in a checkpoint ----


def settings_of_training(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that change the weights that a training ends with, as JSON has them."""
    inherited = {f.name for f in fields(TrainingArguments)}
    own = [f.name for f in fields(GradAugConfig) if f.name not in inherited and f.name not in OTHER_SETTINGS]
    values = {name: getattr(args, name) for name in (*own, *SETTINGS_OF_TRAINING)}
    return json.loads(json.dumps(values, default=lambda value: value.value if isinstance(value, Enum) else str(value)))


def write_state(folder: Path, settings: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    """Write settings and progress of a training into its checkpoint."""
    (folder / STATE).write_text(json.dumps({"settings": settings, "progress": progress}, indent=2) + "\n")


@as_resume_errors()
def read_state(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the `settings` and the `progress` of a checkpoint, both empty where another trainer wrote it."""
    file = folder / STATE
    if not file.is_file():
        return {"settings": {}, "progress": {}}
    content = read_json(file)
    state = {name: content.get(name, {}) for name in ("settings", "progress")}
    if not has_types(state, {"settings": dict, "progress": dict}):
        raise ResumeError(f"{file} is damaged: settings and progress must be values by name; {RESUME_ELSEWHERE}")
    for name in state["progress"].keys() & PROGRESS.keys():
        value = state["progress"][name]
        if not has_types(value, PROGRESS[name]):
            raise ResumeError(f"{file} is damaged: progress has {name} {str(value)[:100]}; {RESUME_ELSEWHERE}")
    return state


def check_settings(folder: Path, settings: Mapping[str, Any], may_be_longer: bool = False) -> None:
    """Raise a ResumeError if a training would go on with other settings than it was begun with.

    Args:
        folder: the checkpoint.
        settings: of now; those that the checkpoint does not know are passed over.
        may_be_longer: whether the steps do not depend on their number, so that there may be more than before.
    """
    saved = read_state(folder)["settings"]
    different = [name for name in sorted(saved.keys() & settings.keys()) if saved[name] != settings[name]]
    longer = [name for name in different if name in LENGTHS and 0 < saved[name] < settings[name]]
    if may_be_longer:
        different = [name for name in different if name not in longer]
    if different:
        listed = "; ".join(_difference(name, saved[name], settings[name]) for name in different)
        later = "the weight of the sub-networks rises" if settings.get("kl_warmup") else "the learning rate falls"
        schedule = f" In a longer training {later} later, from here on." if longer else ""
        raise ResumeError(
            f"{folder} was trained with other settings: {listed}.{schedule} Set them as they were, or set "
            "ignore_config_change to go on with those of now"
        )


def _difference(name: str, was: Any, now: Any) -> str:
    if name == CLASS_NAMES:  # there may be thousands
        pairs = enumerate(zip_longest(*(names if isinstance(names, list) else [] for names in (was, now))))
        label, (was, now) = next(((label, pair) for label, pair in pairs if pair[0] != pair[1]), (0, (was, now)))
        name = f"class {label}"
    return f"{name} was {was!r} and is {now!r}"


# ---- checks of its files ----


def check_whole(folder: Path) -> None:
    """Raise a ResumeError or WeightsError if a folder is no checkpoint, or a file in it is missing or damaged."""
    if not folder.is_dir():
        raise ResumeError(f"resume_from_checkpoint is {str(folder)!r}, which is no folder")
    for name in (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME):
        if not (folder / name).is_file():
            raise ResumeError(f"{folder} has no {name}, so that training cannot be resumed from it")
    if not has_types(read_json(folder / TRAINER_STATE_NAME), {"global_step": int, "log_history": [dict]}):
        raise ResumeError(f"{folder / TRAINER_STATE_NAME} is damaged: it has no global_step; {RESUME_ELSEWHERE}")
    for pattern in ("*.pt", "*.pth"):
        for file in sorted(folder.glob(pattern)):
            if not zipfile.is_zipfile(file):
                raise ResumeError(f"{file} is damaged or cut off; {RESUME_ELSEWHERE}")
            read_pickle(file, map_location="meta", mmap=True)
    weight_shapes(folder)
