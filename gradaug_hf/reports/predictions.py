"""Predictions on labelled images in numbers: accuracy of each class, confusions, and the worst mistakes."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradaug_hf.utils.tables import markdown_table

# Classes in a table that is printed; all of them are in the file.
CLASSES_SHOWN = 20


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model on images with labels.

    Args:
        probabilities: (N, classes).
        labels: class indices (N,).
        names: of the classes.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    names: Sequence[str]

    @property
    def predicted(self) -> np.ndarray:
        """Return the class with the highest probability of each image, (N,)."""
        return self.probabilities.argmax(1)


@dataclass(frozen=True)
class ClassResult:
    """The result of one class.

    Args:
        name: of the class.
        images: number of images that have it as their label.
        correct: number of those that were predicted.
        taken_for: the class that the others were predicted as most often; None where there are none.
    """

    name: str
    images: int
    correct: int
    taken_for: str | None = None

    @property
    def accuracy(self) -> float | None:
        """Return the share in 0..1 that was predicted; None without images."""
        return self.correct / self.images if self.images else None


def predictions_of(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Predictions:
    """Return predictions as probabilities."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return Predictions(exponentials / exponentials.sum(1, keepdims=True), labels, names)


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Return the number of images (classes, classes) of each label, by row, and each prediction, by column."""
    classes = len(predictions.names)
    pairs = predictions.labels * classes + predictions.predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def class_results(predictions: Predictions) -> list[ClassResult]:
    """Return the result of each class, in their order."""
    results = []
    for label, row in enumerate(confusion_matrix(predictions)):
        wrong = row.copy()
        wrong[label] = 0
        taken_for = predictions.names[wrong.argmax()] if wrong.any() else None
        results.append(ClassResult(predictions.names[label], int(row.sum()), int(row[label]), taken_for))
    return results


def worst_mistakes(predictions: Predictions, number: int = 12) -> list[int]:
    """Return the indices of wrongly predicted images, those whose true class has the lowest probability first."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    order = np.argsort(predictions.probabilities[wrong, predictions.labels[wrong]], kind="stable")
    return wrong[order][:number].tolist()


def class_table(results: Sequence[ClassResult]) -> str:
    """Return the results of classes as a Markdown table, of the least accurate ones where there are many."""
    shown = list(results)
    if len(shown) > CLASSES_SHOWN:
        shown = sorted((r for r in shown if r.images), key=lambda r: r.accuracy)[:CLASSES_SHOWN]
    rows = [(r.name, r.taken_for or "", str(r.images), _percent(r.accuracy)) for r in shown]
    return markdown_table(("class", "most often taken for", "images", "accuracy %"), rows, text_columns=2)


def write_class_results(results: Sequence[ClassResult], file: Path) -> None:
    """Write the results of classes as CSV."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("class", "images", "correct", "accuracy", "most_often_taken_for"))
        for r in results:
            accuracy = "" if r.accuracy is None else f"{r.accuracy:.4f}"
            writer.writerow((r.name, r.images, r.correct, accuracy, r.taken_for or ""))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
