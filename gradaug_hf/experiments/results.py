"""Results of training runs: table and JSON; `python -m gradaug_hf.experiments.results DIR...` compares runs."""

import json
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gradaug_hf.reports.plots import NEEDS_MATPLOTLIB, plot_comparison
from gradaug_hf.utils.environment import device_name, public_command, versions
from gradaug_hf.utils.tables import markdown_table

RESULTS = "results.json"


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


def save_results(results: Sequence[Result], file: Path, settings: dict[str, Any], device: torch.device) -> None:
    """Write results as JSON, with what is needed to get them again.

    Args:
        results: Results of the runs.
        file: JSON file to write.
        settings: Settings that the runs shared, the seed among them.
        device: Device on which they ran.
    """
    content = {**run_context(settings, device), "runs": [asdict(result) for result in results]}
    file.write_text(json.dumps(content, indent=2) + "\n")


def run_context(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What is needed to get results again: command, settings, device, threads and versions.

    Args:
        settings: of the run, the seed among them.
        device: on which it runs.
    """
    return {
        "command": public_command(sys.argv),
        "settings": settings,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
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


def main(argv: Sequence[str] | None = None) -> None:
    """Compare finished runs, as the command line says."""
    parser = ArgumentParser(
        prog="python -m gradaug_hf.experiments.results", description="Compare runs by their results.json."
    )
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
        parser.error(NEEDS_MATPLOTLIB)
    except (OSError, ValueError) as error:
        parser.error(f"plot {args.plot} cannot be written: {error}")
    print(f"\nwrote {args.plot}")


if __name__ == "__main__":
    main()
