"""Checks of the output folder, of how the processes were launched, and of labels, each before any long work."""

import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import DataCollator, PreTrainedModel
from transformers.trainer_utils import has_length

from gradaug_hf.data.collator import as_int64
from gradaug_hf.objective.problems import MULTI_LABEL, SINGLE_LABEL, Problem
from gradaug_hf.objective.teaching import check_teacher as check_taught
from gradaug_hf.trainer.batches import IMAGES
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.utils.compat import ACTIVATION_CHECKPOINTING, has_static_graph


def check_output_dir(args: GradAugConfig) -> None:
    """Raise a ValueError if this process is to write to the output folder, and cannot."""
    if args.should_save:
        check_writable(args.output_dir)


def check_writable(output_dir: str) -> None:
    """Make a folder, and a file in it for a moment; raise a ValueError if it cannot be written."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"output_dir is {output_dir!r}, which cannot be written: {error}") from error


def check_launch(args: GradAugConfig, deepspeed: bool) -> None:
    """Raise a ValueError if the processes or the optimiser do not bear several backward passes in a step."""
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs and would use DataParallel, under which sub-networks do not work; "
            f"start one process for each: accelerate launch --num_processes {args.n_gpu} SCRIPT"
        )
    if has_static_graph(args):
        raise ValueError("ddp_static_graph is True, but the graph differs from sub-network to sub-network; set False")
    if args.subnet_backward == "joint":
        return
    if deepspeed:
        raise ValueError('DeepSpeed allows one backward in a step; set subnet_backward="joint"')
    if "lomo" in args.optim.value or "layerwise" in args.optim.value:
        raise ValueError(
            f'optim is {args.optim.value!r}, which steps within the backward; set subnet_backward="joint" so that '
            "there is one in a step"
        )


def check_even_batches(args: GradAugConfig, dataset: Any) -> None:
    """Raise a ValueError if a process would have fewer batches than others, which would wait for it for ever."""
    if args.world_size == 1 or args.accelerator_config.even_batches or args.dataloader_drop_last:
        return
    size = args.train_batch_size * args.world_size
    if not isinstance(dataset, IterableDataset) and len(dataset) % size:
        raise ValueError(
            f"accelerator_config has even_batches False, and {len(dataset)} images are no multiple of {size} "
            f"({args.world_size} processes with {args.train_batch_size} each), so that processes would wait for each "
            "other for ever; set even_batches=True or dataloader_drop_last=True"
        )


def check_columns(args: GradAugConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Raise a ValueError if `remove_unused_columns` removes columns from which a dataset's transform makes images."""
    evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in {"train_dataset": train_dataset, **evaluated}.items():
        columns = getattr(dataset, "column_names", None)
        if args.remove_unused_columns and isinstance(columns, list) and IMAGES not in columns:
            raise ValueError(
                f"remove_unused_columns is True, which would remove the columns {columns} of {name} before its "
                f"transform makes {IMAGES!r} of them; set remove_unused_columns=False"
            )


def check_train_dataset(dataset: Any) -> None:
    """Raise a ValueError if a dataset to train on has no images."""
    if has_length(dataset) and not len(dataset):
        raise ValueError("train_dataset has no images; it must have at least one")


def check_checkpointing(network: nn.Module, args: GradAugConfig) -> None:
    """Raise a ValueError if layers would be computed anew at another width, or a network has no switch for it."""
    asked = getattr(args, ACTIVATION_CHECKPOINTING)
    if asked and not isinstance(network, PreTrainedModel):
        raise ValueError(
            f"{ACTIVATION_CHECKPOINTING} is True, which {type(network).__name__} does not know; leave it out, and "
            "call model.set_grad_checkpointing() of a timm network"
        )
    on = asked or any(getattr(m, "grad_checkpointing", False) for m in network.modules())
    if on and args.subnet_backward == "joint":
        raise ValueError(
            'activation checkpointing computes layers anew in the backward; set subnet_backward="sequential", with '
            "which each pass still has its width then"
        )


def check_teacher(teacher: nn.Module | None, model: nn.Module, args: GradAugConfig) -> None:
    """Raise a ValueError if there is a teacher, but no sub-network can learn its prediction."""
    if teacher is None:
        return
    if args.num_subnets == 0:
        raise ValueError("teacher is given, but with num_subnets=0 there are no sub-networks to learn its prediction")
    check_taught(teacher, model, args.subnet_target)


@dataclass
class LabelCheckingCollator:
    """Collate a batch and check its labels while they lie on the CPU, where that costs nothing.

    Class indices become int64, whatever integers they were, and multi-hot labels float. Other attributes are those of
    the collator that makes the batch.

    Args:
        collate: makes the batch.
        num_classes: of the model; None if it states none.
        problem: the kind of classification.
    """

    collate: DataCollator
    num_classes: int | None
    problem: Problem = SINGLE_LABEL

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "collate":  # asked for while a copy is made
            raise AttributeError(name)
        return getattr(self.collate, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("collate", "num_classes", "problem"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.collate, name, value)

    def __call__(self, features: list[Any]) -> Any:
        batch = self.collate(features)
        labels = batch.get("labels") if isinstance(batch, MutableMapping) else None
        if isinstance(labels, Tensor):
            self.problem.check_labels(labels, self.num_classes)
            is_hot = self.problem == MULTI_LABEL and not labels.is_floating_point()
            # A transformers model would train with others and fail in evaluate.
            batch["labels"] = labels.float() if is_hot else as_int64(labels)
        return batch
