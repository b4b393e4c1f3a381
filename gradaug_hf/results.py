"""Results of training runs: table, JSON and plot; `python -m gradaug_hf.results DIR...` compares finished ones."""

import json
import platform
import statistics
import sys
from argparse import ArgumentParser
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


@dataclass(frozen=True)
class Run:
    """A result and what of its settings tells it from others.

    Args:
        model: Name of the network.
        data: Name of the data set.
        seed: Seed of the run.
        result: What the run came to.
        file: Where it was read.
    """

    model: str
    data: str
    seed: int
    result: Result
    file: Path


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


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table, the first columns of text left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells[:text_columns], widths, strict=False)]
        padded += [cell.rjust(width) for cell, width in zip(cells[text_columns:], widths[text_columns:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rules = ["-" * (width + 2) for width in widths[:text_columns]]
    rules += ["-" * (width + 1) + ":" for width in widths[text_columns:]]
    return "\n".join([line(header), "|" + "|".join(rules) + "|", *map(line, rows)])


def save_results(results: Sequence[Result], file: Path, settings: dict[str, Any], device: torch.device) -> None:
    """Write results as JSON, with what is needed to get them again.

    Args:
        results: Results of the runs.
        file: JSON file to write.
        settings: Settings that the runs shared, the seed among them.
        device: Device on which they ran.
    """
    content = provenance(settings, device) | {"runs": [asdict(result) for result in results]}
    file.write_text(json.dumps(content, indent=2) + "\n")


def provenance(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What is needed to get results of this process again, as JSON takes it.

    Args:
        settings: of the run.
        device: Device on which it ran.
    """
    return {
        "command": " ".join(sys.argv),
        "settings": settings,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS_OF}},
    }


def load_runs(folder: Path) -> list[Run]:
    """The runs in `results.json` of a folder.

    Raises:
        ValueError: there is no such file, or it does not hold results.
    """
    file = folder / RESULTS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no {RESULTS}; name the output folders of finished runs") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    try:
        settings = content["settings"]
        model, data, seed = str(settings["model"]), settings["dataset_name"] or "handwritten digits", settings["seed"]
        return [Run(model, data, seed, Result(**result), file) for result in content["runs"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold the results of a run: {error!r}") from error


def group_runs(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, by model, data, method and number of steps, in the order of the first.

    Raises:
        ValueError: two runs of a group have the same seed.
    """
    groups: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        group = groups.setdefault((run.model, run.data, run.result.method, run.result.steps), {})
        if run.seed in group:
            raise ValueError(
                f"{group[run.seed].file} and {run.file} are both of method {run.result.method!r}, {run.model}, "
                f"{run.result.steps} steps and seed {run.seed}; name one of them"
            )
        group[run.seed] = run
    return [list(group.values()) for group in groups.values()]


def comparison_table(groups: Sequence[Sequence[Run]]) -> str:
    """Mean and sample deviation over the seeds of each group as a Markdown table."""
    header = ("method", "model", "data", "steps", "seeds", "top-1 %", "top-5 %", "seconds", "peak memory MiB")
    rows = [
        (
            runs[0].result.method,
            runs[0].model,
            runs[0].data,
            str(runs[0].result.steps),
            str(len(runs)),
            spread([100 * run.result.top1 for run in runs], 2),
            spread([100 * run.result.top5 for run in runs], 2),
            spread([run.result.seconds for run in runs], 1),
            f"{max(run.result.peak_memory for run in runs):.0f}",
        )
        for runs in groups
    ]
    return markdown_table(header, rows, text_columns=3)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample deviation of some values as text."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def plot_comparison(groups: Sequence[Sequence[Run]], file: Path) -> None:
    """Draw top-1 accuracy of each seed of each group, with mean and sample deviation.

    Args:
        groups: Runs that differ in their seed.
        file: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.5 * len(groups)), layout="constrained")
    axes = figure.add_subplot(xlabel="top-1 accuracy (%)")
    for row, runs in enumerate(groups):
        top1 = [100 * run.result.top1 for run in runs]
        deviation = statistics.stdev(top1) if len(top1) > 1 else 0
        axes.errorbar(statistics.mean(top1), row, xerr=deviation, fmt="D", color="black", capsize=4)
        axes.plot(top1, [row] * len(top1), "|", color="0.4", markersize=14)
    labels = [f"{runs[0].result.method}, {runs[0].model}, {runs[0].result.steps} steps" for runs in groups]
    axes.set_yticks(range(len(groups)), labels)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


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


def main(argv: Sequence[str] | None = None) -> None:
    """Compare finished runs, as the command line says."""
    parser = ArgumentParser(prog="python -m gradaug_hf.results", description="Compare runs by their results.json.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="output folder of a run")
    parser.add_argument("--plot", type=Path, default=Path("results.png"), help="PNG file to write")
    args = parser.parse_args(argv)
    try:
        groups = group_runs([run for folder in args.folders for run in load_runs(folder)])
    except ValueError as error:
        parser.error(str(error))
    print(comparison_table(groups))
    try:
        plot_comparison(groups, args.plot)
    except ModuleNotFoundError:
        parser.error("the plot needs matplotlib: pip install matplotlib")
    except (OSError, ValueError) as error:
        parser.error(f"plot {args.plot} cannot be written: {error}")
    print(f"\nwrote {args.plot}")


if __name__ == "__main__":
    main()
