"""Batches of images and labels, from examples by name or from pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import default_data_collator

IMAGES, LABELS = "pixel_values", "labels"


def collate_images(examples: Sequence[Any]) -> dict[str, Any]:
    """Collate examples into a batch, as `default_data_collator` of transformers does, pairs of image and label too.

    Args:
        examples: mappings by name; or pairs, as the datasets of torchvision give them, of an image, a tensor
            (C, H, W), and its label, an integer or probabilities (classes,).

    Returns:
        For pairs `pixel_values` (N, C, H, W) and `labels` (N,) or (N, classes). Integer labels are int64.

    Raises:
        ValueError: an example is a tuple that is no such pair.

    Examples:
        >>> batch = collate_images([(torch.zeros(3, 8, 8), 1), (torch.ones(3, 8, 8), 0)])
        >>> batch["pixel_values"].shape, batch["labels"]
        (torch.Size([2, 3, 8, 8]), tensor([1, 0]))
    """
    batch = default_data_collator([_by_name(example) for example in examples])
    if isinstance(batch.get(LABELS), Tensor):
        batch[LABELS] = as_int64(batch[LABELS])
    return batch


def as_int64(labels: Tensor) -> Tensor:
    """Return integer labels of any size as int64, which every loss takes; other labels as they are."""
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels.long() if is_integer else labels


def _by_name(example: Any) -> Any:
    if isinstance(example, Mapping) or not isinstance(example, (tuple, list)):
        return example
    if len(example) != 2:
        raise ValueError(
            f"an example is a {type(example).__name__} of {len(example)}; expected a pair of image and label, or "
            f"{IMAGES!r} and {LABELS!r} by name"
        )
    image, label = example
    if isinstance(image, PIL.Image.Image):
        raise ValueError(
            "the image of an example is one of Pillow; give its dataset a transform that makes it a tensor (C, H, W), "
            "such as `imagenet_transform(train=True)`"
        )
    return {IMAGES: image, LABELS: label}
