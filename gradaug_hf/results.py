"""Results of training runs: table, JSON and plot."""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

VERSIONS_OF = ("torch", "torchvision", "timm", "transformers", "accelerate", "datasets")
RESULTS = "results.json"
MARKERS = "osD^v"
LINE_STYLES = ("--", "-", ":", "-.")


@dataclass(frozen=True)
class Result:
    """What one training run came to.

    Args:
        method: Name of the method.
        top1: Top-1 accuracy of the final epoch, in 0..1.
        top5: Top-5 accuracy of the final epoch, in 0..1.
        steps: Steps of the optimiser.
        seconds: Time of training, without that of evaluation.
        peak_memory: Peak memory while training, in mebibytes.
        curve: Step and top-1 accuracy in 0..1 at each evaluation.
        widths: Width, top-1 and top-5 accuracy in 0..1 of each sub-network that was evaluated.
    """

    method: str
    top1: float
    top5: float
    steps: int
    seconds: float
    peak_memory: float
    curve: list[tuple[int, float]]
    widths: list[tuple[float, float, float]] = field(default_factory=list)


def results_table(results: Sequence[Result]) -> str:
    """Results as a Markdown table, one row each."""
    header = ("method", "top-1 %", "top-5 %", "steps", "seconds", "peak memory MiB")
    rows = [
        (
            r.method,
            f"{r.top1:.2%}"[:-1],
            f"{r.top5:.2%}"[:-1],
            str(r.steps),
            f"{r.seconds:.1f}",
            f"{r.peak_memory:.0f}",
        )
        for r in results
    ]
    return markdown_table(header, rows)


def widths_table(widths: Sequence[tuple[float, float, float]]) -> str:
    """Width, top-1 and top-5 accuracy in 0..1 of networks as a Markdown table."""
    rows = [(f"{width:g}", f"{top1:.2%}"[:-1], f"{top5:.2%}"[:-1]) for width, top1, top5 in widths]
    return markdown_table(("width", "top-1 %", "top-5 %"), rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def save_results(results: Sequence[Result], file: Path, settings: dict[str, Any], device: torch.device) -> None:
    """Write results as JSON, with what is needed to get them again.

    Args:
        results: Results of the runs.
        file: JSON file to write.
        settings: Settings that the runs shared, the seed among them.
        device: Device on which they ran.
    """
    content = {
        "command": " ".join(sys.argv),
        "settings": settings,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS_OF}},
        "runs": [asdict(result) for result in results],
    }
    file.write_text(json.dumps(content, indent=2) + "\n")


def plot_curves(results: Sequence[Result], file: Path, title: str) -> None:
    """Draw top-1 accuracy against the share of the training, a curve for each run.

    Curves differ in line style, marker and lightness, so that colour need not be seen.

    Args:
        results: Results of at most five runs.
        file: PNG file to write.
        title: Title of the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="share of the training steps (%)", ylabel="top-1 accuracy (%)")
    for index, result in enumerate(results):
        steps, accuracies = zip(*result.curve, strict=True)
        axes.plot(
            [100 * step / result.steps for step in steps],
            [100 * accuracy for accuracy in accuracies],
            color=str(0.6 * index / max(1, len(results) - 1)),
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            marker=MARKERS[index % len(MARKERS)],
            label=f"{result.method}: {result.top1:.2%} after {result.steps} steps",
        )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
