"""Weights of classes: the full network's loss counts each class the same, however many images it has."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gradaug_hf.objective.losses import at_least_float32, check_labels, check_logits


def balanced_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return the weight (classes,) of each class: the mean number of images of a class over its own.

    The mean over all images is 1. A class without images has weight 0.

        >>> balanced_weights([0, 0, 0, 1], 2)
        tensor([0.6667, 2.0000])
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=num_classes)
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean over the images of the weight of a label times its cross-entropy, in at least float32.

    It is divided by the number of images, not by the sum of their weights, so that two batches of 4 give the gradient
    of one of 8.

    Args:
        logits: (N, classes).
        labels: class indices (N,), or probabilities (N, classes), whose weight is the mean of those of the classes.
        class_weights: (classes,).
        label_smoothing: as for `cross_entropy`.

    Raises:
        ValueError: as `cross_entropy`.
    """
    check_logits(logits, len(labels))
    check_labels(labels, logits.shape[1])
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        class_weights = class_weights.to(logits)
        labels = labels.to(logits.dtype) if labels.ndim == 2 else labels.long()
        weights = labels @ class_weights if labels.ndim == 2 else class_weights[labels]
        losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        return (weights * losses).mean()
