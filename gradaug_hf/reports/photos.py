"""Plots of photos and of the predictions on them. They are read without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from gradaug_hf.reports.plots import DPI, new_figure
from gradaug_hf.reports.predictions import Predictions, class_results, confusion_matrix

if TYPE_CHECKING:
    import PIL.Image
    from matplotlib.figure import Figure

EXAMPLES, CONFUSION, MISTAKES = "examples.png", "confusion.png", "mistakes.png"
COLUMNS = 4
# Classes up to which a confusion matrix has its counts, and its names.
MOST_COUNTS, MOST_NAMES = 20, 60


def plot_photos(photos: Sequence[np.ndarray | PIL.Image.Image], captions: Sequence[str], title: str) -> Figure:
    """Plot photos in rows of four, each with its caption."""
    rows = max(1, math.ceil(len(photos) / COLUMNS))
    figure = new_figure(figsize=(2.6 * COLUMNS, 0.4 + 3.0 * rows))
    figure.suptitle(title)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, photo, caption in zip(grid, photos, captions, strict=False):
        axes.imshow(photo)
        axes.set_title(caption, fontsize=9)
    return figure


def plot_confusion(predictions: Predictions) -> Figure:
    """Plot the confusion matrix: in each row the images of one class, darker where more of them got a prediction."""
    counts = confusion_matrix(predictions)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    classes = len(counts)
    side = 2.5 + min(0.6 * classes, 0.25 * MOST_NAMES)
    figure = new_figure(figsize=(side + 1.5, side))
    correct = counts.trace() / max(1, counts.sum())
    axes = figure.add_subplot(
        title=f"{correct:.1%} of {counts.sum():,} images correct", xlabel="predicted class", ylabel="true class"
    )
    image = axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the images of a class")
    axes.set(xticks=[], yticks=[])
    if classes <= MOST_NAMES:
        results = class_results(predictions)
        of = [f"{r.name}\n{r.correct} of {r.images}" if classes <= MOST_COUNTS else r.name for r in results]
        axes.set_yticks(range(classes), of)
        axes.set_xticks(range(classes), predictions.names, rotation=90 if classes > 4 else 0)
    if classes <= MOST_COUNTS:
        for row, column in np.ndindex(counts.shape):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=shade)
    return figure


def mistake_caption(predictions: Predictions, index: int, file: str | None) -> str:
    """Return what was predicted of an image, with which probability, its true class and its file."""
    label, predicted = predictions.labels[index], predictions.predicted[index]
    said = f"predicted {predictions.names[predicted]}, {predictions.probabilities[index, predicted]:.0%}"
    return f"{said}\nis {predictions.names[label]}" + (f": {Path(file).name}" if file else "")


def as_photo(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return a normalised image (3, H, W) as a photo (H, W, 3) in 0..1, from mean and deviation of its channels."""
    return (pixels.permute(1, 2, 0).numpy() * np.asarray(std) + np.asarray(mean)).clip(0, 1)


def save_plot(figure: Figure, file: Path) -> None:
    """Write a plot as PNG, and the folder for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)
