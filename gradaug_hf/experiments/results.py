"""Results of training runs: table, JSON and comparison."""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gradaug_hf.reports.plots import plot_comparison
from gradaug_hf.reports.runs import Result, Run
from gradaug_hf.utils.environment import device_name, public_command, public_settings, versions
from gradaug_hf.utils.tables import markdown_table

RESULTS = "results.json"


def check_free(output_dir: str, checkpoint: str | None, overwrite: bool) -> None:
    """Raise a ValueError where a run would write over the results of another, whose checkpoint it does not resume."""
    file = Path(output_dir) / RESULTS
    goes_on = checkpoint is not None and Path(output_dir).resolve() in Path(checkpoint).resolve().parents
    if file.exists() and not (overwrite or goes_on):
        raise ValueError(
            f"{output_dir} holds {RESULTS} of another run; give another output_dir, resume_from_checkpoint, or "
            "overwrite_output_dir"
        )


def results_table(results: Sequence[Result]) -> str:
    """Return results as a Markdown table, one row each."""
    header = ("method", "top-1 %", "top-5 %", "steps", "seconds", "peak memory MiB")
    rows = [
        (r.method, percent(r.top1), percent(r.top5), str(r.steps), f"{r.seconds:.1f}", f"{r.peak_memory:.0f}")
        for r in results
    ]
    return markdown_table(header, rows)


def percent(share: float | None) -> str:
    """Return a share in 0..1 in %, or a dash for None."""
    return "-" if share is None else f"{share:.2%}"[:-1]


def widths_table(widths: Sequence[tuple[float, float, float | None]]) -> str:
    """Return width, top-1 and top-5 accuracy in 0..1 as a Markdown table in %."""
    rows = [(f"{width:g}", percent(top1), percent(top5)) for width, top1, top5 in widths]
    return markdown_table(("width", "top-1 %", "top-5 %"), rows)


def save_results(results: Sequence[Result], file: Path, settings: dict[str, Any], device: torch.device) -> None:
    """Write the results of runs that shared their settings, as JSON, with what is needed to get them again."""
    content = {**run_context(settings, device), "runs": [asdict(result) for result in results]}
    file.write_text(json.dumps(content, indent=2) + "\n")


def run_context(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return what is needed to get results again: command, settings, device, threads and versions."""
    return {
        "command": public_command(sys.argv),
        "settings": public_settings(settings),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def load_runs(folder: Path) -> list[Run]:
    """Read the runs in `results.json` of a folder; raise a ValueError where it holds no results."""
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
    """Group runs that differ in their seed alone, by model, data, method and number of steps, in their order."""
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
    """Return mean and sample deviation over the seeds of each group as a Markdown table."""
    header = ("method", "model", "data", "steps", "seeds", "top-1 %", "top-5 %", "seconds", "peak memory MiB")
    rows = [
        (
            runs[0].result.method,
            runs[0].model,
            runs[0].data,
            str(runs[0].result.steps),
            str(len(runs)),
            spread([100 * run.result.top1 for run in runs], 2),
            "-" if runs[0].result.top5 is None else spread([100 * run.result.top5 for run in runs], 2),
            spread([run.result.seconds for run in runs], 1),
            f"{max(run.result.peak_memory for run in runs):.0f}",
        )
        for runs in groups
    ]
    return markdown_table(header, rows, text_columns=3)


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and sample deviation of some values as text."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def compare(folders: Sequence[Path], plot: Path) -> str:
    """Plot the top-1 accuracies of finished runs into a PNG file, and return a table of them.

    Raises:
        ValueError: a folder does not hold the results of a run, two runs are the same but for their folder, or the
            plot cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    groups = group_runs([run for folder in folders for run in load_runs(folder)])
    try:
        plot_comparison(groups, plot)
    except (OSError, ValueError) as error:
        raise ValueError(f"plot {plot} cannot be written: {error}") from error
    return comparison_table(groups)
