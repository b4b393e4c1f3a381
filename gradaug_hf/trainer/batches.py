"""The parts of a batch, by their names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils.generic import find_labels

IMAGES, LABELS = "pixel_values", "labels"
Batch = dict[str, Any]
# The label that a Trainer counts as no item of a batch.
IGNORED = -100


def images_of(batch: Any) -> Tensor:
    """Return the images (N, C, H, W) of a batch, or raise a ValueError if it has none."""
    if not isinstance(batch, Mapping) or IMAGES not in batch:
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"a batch holds {found}; expected {IMAGES!r} (N, C, H, W) and {LABELS!r}")
    return batch[IMAGES]


def as_evaluated(batch: Mapping[str, Any], model: nn.Module, args: TrainingArguments) -> Mapping[str, Any]:
    """Return a batch with images of the dtype that `fp16_full_eval` and `bf16_full_eval` give a model."""
    images = batch.get(IMAGES)
    if not (args.fp16_full_eval or args.bf16_full_eval) or not isinstance(images, Tensor):
        return batch
    return {**batch, IMAGES: images.to(next(model.parameters()).dtype)}


def name_images(model: nn.Module) -> None:
    """Tell the Trainer that a model which takes its input by position takes images, not tokens."""
    if not find_labels(type(model)) and not hasattr(model, "main_input_name"):
        model.main_input_name = IMAGES


def split_batch(batch: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the images (N, C, H, W), the labels, (N,) or (N, classes), and the rest of a batch.

    A ValueError says which of the first two it lacks.
    """
    images = images_of(batch)
    if batch.get(LABELS) is None:
        raise ValueError(f"a batch holds {list(batch)}; expected {IMAGES!r} and {LABELS!r}, (N,) or (N, classes)")
    return images, batch[LABELS], {name: value for name, value in batch.items() if name not in (IMAGES, LABELS)}
