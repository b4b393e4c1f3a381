"""The losses of GradAug (arXiv 2006.07989) as pure functions, in at least float32 and outside autocast."""

import torch
from torch import Tensor
from torch.nn import functional

# How far the sum of a soft label may be from one; half precision and mixed labels round it.
SUM_TOLERANCE = 0.01


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of hard or soft labels, averaged over the batch.

    A class whose logit is -inf adds nothing where its probability is 0. The values of labels are checked only where
    they lie on the CPU: elsewhere reading them would make the device wait in every step.

    Args:
        logits: (N, classes).
        labels: class indices (N,), or probabilities (N, classes).
        label_smoothing: share of the target that is spread evenly over all classes, 0..1.

    Raises:
        ValueError: a shape or dtype does not fit, or a label on the CPU is out of range or no distribution.
    """
    check_logits(logits, len(labels))
    check_labels(labels, logits.shape[1])
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        if labels.ndim == 1:
            return functional.cross_entropy(logits, labels.long(), label_smoothing=label_smoothing)
        target = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
        return -(target * _log_probabilities(logits, target)).sum(dim=1).mean()


def soft_target_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return the KL divergence from the detached soft target to a sub-network's prediction, averaged over the batch.

    In-place distillation (arXiv 1903.05134): sum of p * (log p - log q) with p the softmax of `target_logits`, q that
    of `logits`, temperature 1. A class that the target gives no probability, such as one whose logit is -inf, adds
    nothing. No gradient reaches `target_logits`.

    Args:
        logits: (N, classes), the sub-network's.
        target_logits: (N, classes), the full network's.

    Raises:
        ValueError: the shapes differ, or are not (N, classes).
    """
    _check_target(logits, target_logits)
    with torch.autocast(logits.device.type, enabled=False):
        target = functional.softmax(at_least_float32(target_logits.detach()), dim=1)
        log_predicted = _log_probabilities(at_least_float32(logits), target)
        return functional.kl_div(log_predicted, target, reduction="batchmean")


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of multi-hot labels, averaged over images and classes as transformers does.

    Args:
        logits: (N, classes).
        labels: (N, classes), 1 for each class that an image has and 0 for the others; mixed labels lie between.

    Raises:
        ValueError: a shape or dtype does not fit, or a label on the CPU is not in 0..1.
    """
    check_logits(logits, len(labels))
    check_multi_hot(labels, logits.shape[1])
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def binary_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return the KL divergence from a detached target to a sub-network's prediction of several independent classes.

    It is that of the Bernoulli distributions of each class, summed over the classes and averaged over the batch: sum
    of p * (log p - log q) + (1 - p) * (log(1 - p) - log(1 - q)) with p the sigmoid of `target_logits`, q that of
    `logits`. No gradient reaches `target_logits`.

    Args:
        logits: (N, classes), the sub-network's.
        target_logits: (N, classes), the full network's.

    Raises:
        ValueError: the shapes differ, or are not (N, classes).
    """
    _check_target(logits, target_logits)
    with torch.autocast(logits.device.type, enabled=False):
        logits, target_logits = at_least_float32(logits), at_least_float32(target_logits.detach())
        target = torch.cat([target_logits, -target_logits]).sigmoid()
        log_predicted = functional.logsigmoid(torch.cat([logits, -logits])).masked_fill(target == 0, 0)
        return functional.kl_div(log_predicted, target, reduction="sum") / len(logits)


def _log_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """Return the log-probabilities of classes, 0 for those whose target is 0: there 0 * -inf would be NaN."""
    return functional.log_softmax(logits, dim=1).masked_fill(target == 0, 0)


def check_logits(logits: Tensor, batch_size: int) -> None:
    """Raise a ValueError unless logits are (batch_size, classes)."""
    if logits.ndim != 2 or len(logits) != batch_size:
        raise ValueError(
            f"the model returned logits of shape {tuple(logits.shape)}; expected ({batch_size}, classes), one row "
            "for each label"
        )


def _check_target(logits: Tensor, target_logits: Tensor) -> None:
    check_logits(target_logits, len(target_logits))
    if logits.shape != target_logits.shape:
        raise ValueError(
            f"the sub-network's logits have shape {tuple(logits.shape)}, the full network's "
            f"{tuple(target_logits.shape)}; both must be (N, classes)"
        )


def check_labels(labels: Tensor, num_classes: int | None = None) -> None:
    """Raise a ValueError unless labels are class indices (N,), or a probability of each class (N, num_classes).

    It names the first row that is wrong. Values are checked on the CPU only. `num_classes` may be unknown: None.
    """
    if labels.is_floating_point():
        _check_soft_labels(labels, num_classes)
        return
    if labels.ndim != 1 or labels.dtype is torch.bool or labels.is_complex():
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected integers (N,) or soft labels "
            f"(N, {num_classes or 'classes'})"
        )
    if labels.device.type == "cpu":
        labels = labels.long()
        wrong = labels[(labels < 0) | (labels >= (num_classes or torch.inf))]
        if len(wrong):
            accepted = "from 0 on" if num_classes is None else f"0..{num_classes - 1}"
            raise ValueError(f"label {wrong[0].item()} is out of range; the model has classes {accepted}")


def _check_soft_labels(labels: Tensor, num_classes: int | None) -> None:
    if labels.ndim != 2 or num_classes not in (None, labels.shape[1]):
        raise ValueError(
            f"soft labels have shape {tuple(labels.shape)}; expected (N, {num_classes or 'classes'}). Class indices "
            "(N,) must be integers"
        )
    if labels.device.type != "cpu":
        return
    sums = labels.double().sum(dim=1)
    wrong = ((sums - 1).abs() <= SUM_TOLERANCE).logical_not() | (labels < 0).any(dim=1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"soft label {row} of a batch sums to {sums[row]:.4g} with smallest entry {labels[row].min():.4g}; each "
            "row must hold probabilities that sum to one. For several classes in one image (multi-label) set "
            "problem_type='multi_label_classification'"
        )


def check_multi_hot(labels: Tensor, num_classes: int | None = None) -> None:
    """Raise a ValueError unless labels say how far an image has each class, (N, num_classes) in 0..1.

    It names the first row that is wrong. Values are checked on the CPU only. `num_classes` may be unknown: None.
    """
    if labels.ndim != 2 or num_classes not in (None, labels.shape[1]) or labels.is_complex():
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; multi_label_classification expects "
            f"multi-hot ones (N, {num_classes or 'classes'}), 1 for each class that an image has"
        )
    if labels.device.type == "cpu" and (wrong := ~((labels >= 0) & (labels <= 1))).any():  # or NaN
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"label {row} of a batch has {labels[row, column].item():.4g} for class {column}; multi-hot labels lie in "
            "0..1"
        )


def at_least_float32(logits: Tensor) -> Tensor:
    """Return logits in float32, or in float64 if that is their dtype."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
