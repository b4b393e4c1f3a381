"""Plots of runs. They are read without colour: curves differ in line style, marker and lightness."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gradaug_hf.objective.sampling import Subnet
from gradaug_hf.objective.transforms import ImageTransform, transform_for_subnet
from gradaug_hf.reports.history import LOSS, Entry, Evaluation, shares, title, training_log
from gradaug_hf.reports.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS = "plots"
CURVES, WIDTHS, SUBNETS = "curves.png", "widths.png", "subnets.png"
NEEDS_MATPLOTLIB = "plots need matplotlib: pip install matplotlib"
MARKERS = "osD^v"
LINE_STYLES = ("-", "--", ":", "-.")
DPI = 150
# Points of a curve that are marked, at most.
MOST_MARKERS = 20
LOSS_PARTS = {"loss": "whole objective", "loss_full": "full network", "loss_subnets": "sub-networks"}
# Images of a batch that are kept and plotted.
IMAGES_SHOWN = 8


@dataclass(frozen=True)
class SeenBatch:
    """A batch and the sub-networks that trained on it.

    Args:
        images: (N, C, H, W), as the full network saw them.
        subnets: the sub-networks, in the order of their passes.
        transform: what changed the images of a sub-network before they were resized.
        num_blocks: number of residual blocks of the model that can be dropped.
    """

    images: Tensor
    subnets: Sequence[Subnet]
    transform: ImageTransform | None = None
    num_blocks: int = 0


def can_plot() -> bool:
    """Return True if matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_training(
    history: Sequence[Entry], measured: Sequence[Evaluation], batch: SeenBatch | None, folder: Path
) -> list[Path]:
    """Plot the log, the evaluations and a batch of a training: `curves.png`, `widths.png` and `subnets.png`.

    Args:
        history: `trainer.state.log_history`.
        measured: evaluations in their order; those at several widths are plotted of the last step that has some.
        batch: that of one step; None leaves out `subnets.png`.
        folder: made if it is missing.

    Returns:
        The files that were written.
    """
    figures = {}
    if training_log(history) or measured:
        figures[CURVES] = training_figure(history, measured)
    if widths := _last_widths(measured):
        figures[WIDTHS] = widths_figure(widths)
    if batch is not None:
        figures[SUBNETS] = batch_figure(batch)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return [folder / name for name in figures]


def _last_widths(measured: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations at several widths of the last step and set that has them."""
    last = next((e for e in reversed(measured) if e.width != 1 and shares(e.metrics)), None)
    return [e for e in measured if last is not None and (e.step, e.data) == (last.step, last.data)]


def training_figure(history: Sequence[Entry], measured: Sequence[Evaluation]) -> Figure:
    """Plot the parts of the loss, and the accuracies of the full network, over the epochs."""
    log = training_log(history)
    full = [e for e in measured if e.width == 1]
    with_shares = [e for e in full if shares(e.metrics)]
    figure = new_figure(figsize=(10 if with_shares else 5.5, 4))
    losses, *others = np.atleast_1d(figure.subplots(1, 2 if with_shares else 1))
    losses.set(title="loss", xlabel="epoch", ylabel="nats per image")
    parts = {label: [(e["epoch"], e[name]) for e in log if name in e] for name, label in LOSS_PARTS.items()}
    if not parts["sub-networks"]:
        parts = {"training": parts["whole objective"]}
    parts |= {_of("evaluation", e.data): [] for e in full}
    for e in full:
        parts[_of("evaluation", e.data)] += [(e.epoch, e.metrics[LOSS])] if LOSS in e.metrics else []
    _add_lines(losses, parts)
    losses.set(xlim=(0, None), ylim=(0, None))
    for axes in others:
        axes.set(title="full network on the evaluation images", xlabel="epoch", ylabel="%")
        curves: dict[str, list[tuple[float, float]]] = {}
        for e in with_shares:
            for name, value in shares(e.metrics).items():
                curves.setdefault(_of(title(name), e.data), []).append((e.epoch, 100 * value))
        _add_lines(axes, curves)
        axes.set_xlim(left=0)
    return figure


def widths_figure(measured: Sequence[Evaluation]) -> Figure:
    """Plot accuracies against the width multiplier."""
    figure = new_figure(figsize=(6, 4))
    axes = figure.add_subplot(
        title=f"accuracy against width, after {measured[0].step} steps", xlabel="width multiplier", ylabel="%"
    )
    curves: dict[str, list[tuple[float, float]]] = {}
    for e in sorted(measured, key=lambda e: e.width):
        for name, value in shares(e.metrics).items():
            curves.setdefault(title(name), []).append((e.width, 100 * value))
    _add_lines(axes, curves)
    axes.set_xticks(sorted({e.width for e in measured}))
    return figure


def batch_figure(batch: SeenBatch) -> Figure:
    """Plot images as the full network and each sub-network see them, a row each and all pixels of one size.

    The first eight images are plotted, their values stretched to the range of the full images.
    """
    images = batch.images[:IMAGES_SHOWN].float().cpu()
    rows = [(f"full network: width 1, {_size(images)}", images)]
    for subnet in batch.subnets:
        seen = transform_for_subnet(images, subnet, batch.transform)
        rows.append(
            (f"sub-network: width {subnet.width:.3g}, {_size(seen)}{_left_out(subnet, batch.num_blocks)}", seen)
        )
    heights = [seen.shape[2] for _, seen in rows]
    pitch = 1.1 * max(seen.shape[3] for _, seen in rows)  # of the columns, in pixels
    inches = 1.25 / pitch
    low, high = images.min(), images.max()
    figure = new_figure(figsize=(inches * pitch * len(images), inches * sum(heights) + 0.4 * len(rows)))
    grid = figure.subplots(len(rows), 1, gridspec_kw={"height_ratios": heights})
    for axes, (text, seen) in zip(np.atleast_1d(grid), rows, strict=True):
        axes.set_title(text, loc="left", fontsize=11)
        axes.set_axis_off()
        for column, image in enumerate(_displayed(seen, low, high)):
            height, width = image.shape[:2]
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(column * pitch, column * pitch + width, height, 0))
        axes.set(xlim=(0, pitch * len(images)), ylim=(seen.shape[2], 0))
    return figure


def plot_comparison(groups: Sequence[Sequence[Run]], file: Path) -> None:
    """Plot top-1 accuracy of each seed of each group, with mean and sample deviation, a panel for each dataset."""

    def label(runs: Sequence[Run]) -> str:
        return f"{runs[0].result.method}, {runs[0].model}, {runs[0].result.steps} steps"

    found = {(label(runs), runs[0].data): [run.result.top1 for run in runs] for runs in groups}
    labels, datasets = (list(dict.fromkeys(place)) for place in zip(*found, strict=True))
    panels = {data: [found.get((name, data), []) for name in labels] for data in datasets}
    plot_spreads(labels, panels, file)


def plot_spreads(labels: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]], file: Path) -> None:
    """Plot top-1 accuracies of several seeds, a row for each label, with mean and sample deviation.

    Each panel has the accuracies of each row, in 0..1; none where a row has no result.
    """
    figure = new_figure(figsize=(3.5 + 3.5 * len(panels), 1 + 0.4 * len(labels)))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(grid, panels.items(), strict=True):
        for place, accuracies in enumerate(rows):
            top1 = [100 * accuracy for accuracy in accuracies]
            axes.plot(top1, [place] * len(top1), "|", color="0.4", markersize=14)
            if top1:
                deviation = statistics.stdev(top1) if len(top1) > 1 else 0
                axes.errorbar(statistics.mean(top1), place, xerr=deviation, fmt="D", color="black", capsize=4)
        axes.set(title=name, xlabel="top-1 accuracy (%)")
        axes.grid(alpha=0.3)
    grid[0].set_yticks(range(len(labels)), labels)
    grid[0].set_ylim(len(labels) - 0.5, -0.5)
    figure.savefig(file, dpi=DPI)


def new_figure(**settings: Any) -> Figure:
    """Return an empty figure; raise a ModuleNotFoundError where matplotlib is not installed."""
    if not can_plot():
        raise ModuleNotFoundError(NEEDS_MATPLOTLIB, name="matplotlib")
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **settings)


def line_style(index: int, total: int) -> dict[str, str]:
    """Return lightness, line and marker that tell a curve from others without colour."""
    return {
        "color": str(0.6 * index / max(1, total - 1)),
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _add_lines(axes: Axes, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Plot curves by their label, told apart without colour."""
    curves = {label: points for label, points in curves.items() if points}
    for index, (label, points) in enumerate(curves.items()):
        x, y = zip(*points, strict=True)
        axes.plot(
            x,
            y,
            **line_style(index, len(curves)),
            markersize=5,
            markevery=math.ceil(len(points) / MOST_MARKERS),
            label=label,
        )
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()


def _of(label: str, data: str | None) -> str:
    return label if data is None else f"{label}, {data}"


def _size(images: Tensor) -> str:
    return f"{images.shape[2]}×{images.shape[3]} pixels"


def _left_out(subnet: Subnet, num_blocks: int) -> str:
    """Return what a sub-network does without beside channels and pixels, in words."""
    text = f", {subnet.part.share:.0%} of the batch" if subnet.part is not None else ""
    if subnet.tokens < 1:
        text += f", {subnet.tokens:.0%} of the patches"
    if subnet.survival < 1:
        text += f", {len(subnet.dropped_blocks(num_blocks))} of {num_blocks} blocks dropped"
    return text


def _displayed(images: Tensor, low: Tensor, high: Tensor) -> np.ndarray:
    """Return images (N, H, W, 3) or (N, H, W) in 0..1, with the given values of black and white."""
    images = ((images - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return (images.permute(0, 2, 3, 1) if images.shape[1] == 3 else images.mean(1)).numpy()
