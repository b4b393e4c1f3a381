"""Accuracy and cost of sub-networks against their width: latency, table and plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import thread_time

import torch
from torch import nn
from torch.utils.benchmark import Timer

from gradaug_hf.experiments.results import percent
from gradaug_hf.reports.plots import DPI, line_style, new_figure
from gradaug_hf.utils.tables import markdown_table

# Seconds for which a model is run to time it.
TIMED = 1.0


@dataclass(frozen=True)
class WidthResult:
    """Accuracy and cost of a sub-network.

    Args:
        top1: Top-1 accuracy in 0..1.
        top5: Top-5 accuracy in 0..1; None with five classes or fewer.
        macs: Multiply-adds for one image.
        params: Number of parameters.
        latency: Median computing time of one image on one CPU thread, in milliseconds.
        latency_spread: Interquartile range of these times, in milliseconds.
    """

    top1: float
    top5: float | None
    macs: int
    params: int
    latency: float
    latency_spread: float


@torch.inference_mode()
def cpu_latency(model: nn.Module, side: int) -> tuple[float, float]:
    """Return median and interquartile range of the time of one image on one CPU thread, in milliseconds.

    It is the time that the thread computes, which on an idle machine is the latency; other work does not add to it.
    """
    images = torch.rand(1, 3, side, side)
    timer = Timer("model(images)", timer=thread_time, globals={"model": model, "images": images})
    times = timer.blocked_autorange(min_run_time=TIMED)
    return 1000 * times.median, 1000 * times.iqr


def widths_side_by_side(results: Mapping[str, Mapping[float, WidthResult]]) -> str:
    """Return results as a Markdown table, those of a width below each other."""
    header = ("model", "width", "top-1 %", "top-5 %", "multiply-adds (M)", "parameters (k)", "ms per image")
    rows = [
        (
            model,
            f"{width:g}",
            percent(own[width].top1),
            percent(own[width].top5),
            f"{own[width].macs / 1e6:.2f}",
            f"{own[width].params / 1e3:.1f}",
            f"{own[width].latency:.2f} ± {own[width].latency_spread:.2f}",
        )
        for width in next(iter(results.values()))
        for model, own in results.items()
    ]
    return markdown_table(header, rows)


def plot_widths(results: Mapping[str, Mapping[float, WidthResult]], file: Path, title: str) -> None:
    """Plot top-1 accuracy against width, multiply-adds, parameters and latency, a curve for each model.

    Curves differ in line style, marker and lightness, so that colour need not be seen.
    """
    figure = new_figure(figsize=(11, 7))
    figure.suptitle(title)
    panels = figure.subplots(2, 2, sharey=True)
    costs = ("width", "multiply-adds (M)", "parameters (k)", "ms per image on one CPU thread")
    for axes, label in zip(panels.flat, costs, strict=True):
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set(ylabel="top-1 accuracy (%)")
    for index, (model, own) in enumerate(results.items()):
        style = line_style(index, len(results))
        for axes, values in zip(panels.flat, _costs(own), strict=True):
            axes.plot(values, [100 * result.top1 for result in own.values()], label=model, **style)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(file, dpi=DPI)


def _costs(results: Mapping[float, WidthResult]) -> tuple[Sequence[float], ...]:
    found = results.values()
    return (
        list(results),
        [result.macs / 1e6 for result in found],
        [result.params / 1e3 for result in found],
        [result.latency for result in found],
    )
