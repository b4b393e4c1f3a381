"""Accuracy and average precision, for evaluation."""

import numpy as np
from transformers import EvalPrediction


def topk_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return top-1 and top-5 accuracy; to be given to a Trainer as `compute_metrics`.

    Args:
        prediction: logits (N, classes), or a tuple that starts with them, and class indices (N,).

    Returns:
        `top1` and, with more than five classes, `top5`, shares in 0..1; with fewer every label is among the best five.

    Raises:
        ValueError: the shapes are others, or logits are NaN.

    Examples:
        >>> topk_accuracy(EvalPrediction(np.array([[2.0, 0.0], [1.0, 3.0]]), np.array([0, 0])))
        {'top1': 0.5}
    """
    logits, labels = _logits_and_labels(prediction)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape}; expected (N, classes) and (N,)")
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    hits = best == labels[:, None]
    found = {"top1": float(hits[:, :1].any(axis=1).mean())}
    return found | {"top5": float(hits.any(axis=1).mean())} if logits.shape[1] > best.shape[1] else found


def mean_average_precision(prediction: EvalPrediction) -> dict[str, float]:
    """Return the mean average precision of several classes in an image; to be given to a Trainer as `compute_metrics`.

    The average precision of a class is the mean, over the images that have it, of the precision among the images that
    rank as high; images of equal logits share a rank. Classes that no image has are left out of the mean.

    Args:
        prediction: logits (N, classes), or a tuple that starts with them, and multi-hot labels (N, classes).

    Returns:
        `map`, in 0..1.

    Raises:
        ValueError: the shapes are others, logits are NaN, labels are not 0 or 1, or no image has a class.

    Examples:
        >>> logits, labels = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), np.array([[1, 0], [0, 1], [1, 1]])
        >>> round(mean_average_precision(EvalPrediction(logits, labels))["map"], 4)
        0.9167
    """
    logits, labels = _logits_and_labels(prediction)
    if logits.ndim != 2 or labels.shape != logits.shape:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape}; expected (N, classes) both, multi-hot")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels of the evaluation are not all 0 or 1; mean average precision needs multi-hot ones")
    found = labels.any(axis=0)
    if not found.any():
        raise ValueError("no image of the evaluation has a class, so that there is no average precision")
    columns = zip(logits.T[found], labels.T[found] == 1, strict=True)
    return {"map": float(np.mean([_average_precision(scores, has) for scores, has in columns]))}


def _average_precision(scores: np.ndarray, has_class: np.ndarray) -> float:
    """Return the average precision of one class, from the scores (N,) and truth values (N,)."""
    ranked = np.sort(scores), np.sort(scores[has_class])
    places, hits = (len(each) - np.searchsorted(each, scores[has_class], side="left") for each in ranked)
    return float(np.mean(hits / places))


def _logits_and_labels(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    logits = prediction.predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    if unknown := int(np.isnan(logits).any(axis=tuple(range(1, logits.ndim))).sum()):
        raise ValueError(
            f"the logits of {unknown} of {len(logits)} images are NaN, so that no class is the largest: the model's "
            "weights or the images hold NaN or values that overflow"
        )
    return logits, np.asarray(prediction.label_ids)
