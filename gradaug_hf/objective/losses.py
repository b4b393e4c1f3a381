"""The losses of GradAug (arXiv 2006.07989) as pure functions, in at least float32 and outside autocast."""

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of hard or soft labels, averaged over the batch.

    Labels are compared with the number of classes only where they lie on the CPU: elsewhere reading them would make
    the device wait in every step.

    Args:
        logits: (N, classes).
        labels: class indices (N,), or probabilities (N, classes).
        label_smoothing: share of the target that is spread evenly over all classes, 0..1.

    Raises:
        ValueError: a shape or dtype does not fit, or a label on the CPU is out of range.
    """
    check_logits(logits, len(labels))
    check_labels(labels, logits.shape[1])
    with torch.autocast(logits.device.type, enabled=False):
        logits = _at_least_float32(logits)
        labels = labels.to(logits.dtype) if labels.ndim == 2 else labels.long()
        return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def soft_target_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL divergence from the detached soft target to a sub-network's prediction, averaged over the batch.

    In-place distillation (arXiv 1903.05134): sum of p * (log p - log q) with p the softmax of `target_logits`, q that
    of `logits`, temperature 1. No gradient reaches `target_logits`.

    Args:
        logits: (N, classes), the sub-network's.
        target_logits: (N, classes), the full network's.

    Raises:
        ValueError: the shapes differ, or are not (N, classes).
    """
    check_logits(target_logits, len(target_logits))
    if logits.shape != target_logits.shape:
        raise ValueError(
            f"the sub-network's logits have shape {tuple(logits.shape)}, the full network's "
            f"{tuple(target_logits.shape)}; both must be (N, classes)"
        )
    with torch.autocast(logits.device.type, enabled=False):
        log_predicted = functional.log_softmax(_at_least_float32(logits), dim=1)
        target = functional.softmax(_at_least_float32(target_logits.detach()), dim=1)
        return functional.kl_div(log_predicted, target, reduction="batchmean")


def check_logits(logits: Tensor, batch_size: int) -> None:
    """Raise a ValueError unless logits are (batch_size, classes)."""
    if logits.ndim != 2 or len(logits) != batch_size:
        raise ValueError(
            f"the network returned logits of shape {tuple(logits.shape)}; expected ({batch_size}, classes), one row "
            "for each label"
        )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise a ValueError unless labels are class indices (N,) or probabilities (N, num_classes).

    Whether indices lie in 0..num_classes - 1 is checked on the CPU only.
    """
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(f"soft labels have shape {tuple(labels.shape)}; expected (N, {num_classes})")
        return
    if labels.ndim != 1 or labels.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected integers (N,) or soft labels "
            f"(N, {num_classes})"
        )
    if labels.device.type == "cpu":
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ValueError(f"label {wrong[0].item()} is out of range; the network has classes 0..{num_classes - 1}")


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
