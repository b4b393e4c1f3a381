"""Evaluation of the sub-network of a width, with batch norm recalibrated on training images."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer

from gradaug_hf.data.streaming import ShardedStream
from gradaug_hf.slimming import make_slimmable, recalibrate_batchnorm
from gradaug_hf.slimming.widths import is_slimmable
from gradaug_hf.trainer.batches import as_evaluated, images_of
from gradaug_hf.utils.randomness import random_states_kept, seed_everything

# Training images of which batch norm is recalibrated before a sub-network is evaluated.
CALIBRATION_IMAGES = 1024


def evaluate_at_widths(
    trainer: Trainer, eval_dataset: Any, ignore_keys: list[str] | None, prefix: str
) -> dict[str, float]:
    """Return the metrics of a trainer's model at each of `args.eval_widths`, after logging them."""
    metrics = {}
    for width in trainer.args.eval_widths:
        found = _evaluate_at_width(trainer, width, eval_dataset, ignore_keys, f"{prefix}_width{width:g}")
        trainer.log(found)
        metrics |= found
    return metrics


def _evaluate_at_width(
    trainer: Trainer, width: float, eval_dataset: Any, ignore_keys: list[str] | None, prefix: str
) -> dict[str, float]:
    if not is_slimmable(trainer.model):
        make_slimmable(trainer.model, width_divisor=trainer.args.width_divisor)
    with random_states_kept(), recalibrate_batchnorm(trainer.model, width, _calibration_batches(trainer)):
        return trainer.evaluation_loop(
            trainer.get_eval_dataloader(eval_dataset),
            description=f"Evaluation at width {width:g}",
            prediction_loss_only=True if trainer.compute_metrics is None else None,
            ignore_keys=ignore_keys,
            metric_key_prefix=prefix,
        ).metrics


def _calibration_batches(trainer: Trainer) -> Iterator[Tensor]:
    """Yield images of the training set, the same on every rank."""
    args, images = trainer.args, trainer.train_dataset
    if images is None:
        raise ValueError("eval_widths needs a train_dataset, of which batch norm is recalibrated")
    if isinstance(images, ShardedStream):
        images = images.undivided()
    seed_everything(args.seed)  # the images are augmented alike at every evaluation
    if not isinstance(images, IterableDataset):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
        images = Subset(images, order[:CALIBRATION_IMAGES].tolist())
    size = args.per_device_train_batch_size
    loader = DataLoader(images, size, collate_fn=trainer.data_collator, num_workers=args.dataloader_num_workers)
    for batch in islice(loader, math.ceil(CALIBRATION_IMAGES / size)):
        yield images_of(as_evaluated(trainer._prepare_inputs(batch), trainer.model, args))
