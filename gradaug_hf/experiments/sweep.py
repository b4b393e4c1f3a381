"""Sweeps: many training runs that a plan lists, one process each.

Every run has a folder of its own. Started again, finished runs are skipped, and one that was interrupted goes on from
its last checkpoint.
"""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from gradaug_hf.experiments.arguments import as_flags, read_yaml
from gradaug_hf.experiments.methods import METHODS, concerns_subnets, trains_plainly
from gradaug_hf.experiments.results import RESULTS, load_runs, spread
from gradaug_hf.reports.differences import Record, interval, paired_differences
from gradaug_hf.reports.plots import NEEDS_MATPLOTLIB, can_plot, plot_spreads
from gradaug_hf.reports.runs import Result
from gradaug_hf.utils.command_line import is_first_process
from gradaug_hf.utils.processes import run_to_end
from gradaug_hf.utils.tables import markdown_table

# Files of a run that are not pushed with it, as they name folders of the machine.
SETTINGS, LOG = "_settings.json", "_log.txt"
SUMMARY, TABLE, PLOT = "summary.json", "table.md", "summary.png"
KEYS = ("recipe", "settings", "seeds", "columns", "rows")
LAUNCH = "accelerate launch"
# Lines of its log that are shown of a run that failed.
SHOWN_LINES = 5


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a plan.

    Args:
        row: Name of the settings that are compared, for example a method.
        column: Name of the conditions, for example a number of labels; empty where there is one alone.
        seed: Seed of the run.
        settings: Of the recipe, by name, `seed` among them.
    """

    row: str
    column: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        words = f"{self.column} {self.row} seed{self.seed}".split()
        return "-".join("".join(c if c.isalnum() or c in "._+" else "_" for c in word) for word in words)


@dataclass(frozen=True)
class Plan:
    """A recipe and the runs of it that are compared, every row with every column and seed.

    Args:
        recipe: Script that trains, by flags; or the name of a module that does.
        rows: Name of a row -> its settings.
        seeds: A run of each row and column is trained with each.
        settings: Those that all runs share.
        columns: Name of a column -> its settings.

    Raises:
        ValueError: There are no rows or seeds, two runs would have the same folder, or a token would be written there.
    """

    recipe: Path | str
    rows: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    settings: Mapping[str, Any]
    columns: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not (self.rows and self.seeds and self.columns):
            raise ValueError("a plan needs at least one row and one seed")
        names = [run.name for run in self.runs()]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"several runs of the plan are called {', '.join(sorted(doubled))}; name rows apart")
        if any("hub_token" in run.settings for run in self.runs()):
            raise ValueError("hub_token would be written with the settings of each run; use `hf auth login`")

    def runs(self) -> list[PlannedRun]:
        """Return all runs, seed by seed, so that every row has a first result early.

        Settings of sub-networks that rows share are left out where a row's method has none.
        """
        return [
            PlannedRun(row, column, seed, {**_shared_settings({**self.settings, **shared}, own), **own, "seed": seed})
            for seed in self.seeds
            for column, shared in self.columns.items()
            for row, own in self.rows.items()
        ]

    def conclusion(self, records: Sequence[Record]) -> str:
        """Return what follows from the records of the finished runs, to print and write below their table."""
        return ""


def _shared_settings(shared: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    method = {**METHODS.get(own.get("method", shared.get("method", "")), {}), **own}
    return {name: value for name, value in shared.items() if not (trains_plainly(method) and concerns_subnets(name))}


def read_plan(file: Path) -> Plan:
    """Read a plan: YAML or JSON with `recipe`, `rows` and `seeds`, and `settings` and `columns` if there are any.

    `recipe` is a path from the file's folder; rows and columns map names to settings.

    Raises:
        ValueError: the file cannot be read, or is not a plan.
    """
    content = read_yaml(file)
    if not isinstance(content, dict) or not {"recipe", "rows", "seeds"} <= content.keys() <= set(KEYS):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file} holds {found}; a plan has recipe, rows and seeds, and may have settings and columns")
    for key in ("settings", "rows", "columns"):
        if not isinstance(content.get(key, {}), dict):
            raise ValueError(f"{key} of {file} is a {type(content[key]).__name__}; it must map names to settings")
    recipe = file.parent / content["recipe"]
    if not recipe.is_file():
        raise ValueError(f"recipe of {file} is {content['recipe']!r}, and there is no file {recipe}")
    rows = {str(name): own or {} for name, own in content["rows"].items()}
    columns = {str(name): own or {} for name, own in content.get("columns", {"": {}}).items()}
    return Plan(recipe, rows, content["seeds"], content.get("settings", {}), columns)


def train_all(plan: Plan, folder: Path, launch: str = LAUNCH, seeds: Sequence[int] | None = None) -> list[PlannedRun]:
    """Train what is not trained yet, one run after the other, each in a folder of its own.

    Args:
        plan: The runs, all of them or those of some seeds.
        folder: Of their folders.
        launch: Command that starts a recipe.
        seeds: Seeds of the runs to train; None: all.

    Returns:
        The runs that failed; the others of the plan are trained nevertheless.

    Raises:
        ValueError: the folder holds a run of the same name with other settings, or the plan has no such seed.
    """
    waiting = unfinished_runs(plan, folder, seeds)
    failed, start = [], time.monotonic()
    for number, run in enumerate(waiting, start=1):
        print(f"[{number}/{len(waiting)}] {run.name}: ", end="", flush=True)
        try:
            error = _train(run, plan.recipe, folder / run.name, launch)
        except (KeyboardInterrupt, SystemExit):
            print("interrupted; the same command goes on with it", flush=True)
            raise
        if error is not None:
            failed.append(run)
            print(f"failed\n{error}", flush=True)
            continue
        left = (time.monotonic() - start) / number * (len(waiting) - number) / 60
        print(f"top-1 {_result(run, folder).top1:.2%}, about {left:.0f} min to go", flush=True)
    return failed


def unfinished_runs(plan: Plan, folder: Path, seeds: Sequence[int] | None = None) -> list[PlannedRun]:
    """Return the runs of a plan that are still to be trained, which `train_all` trains, and print how many are."""
    if unknown := sorted(set(seeds or ()) - set(plan.seeds)):
        raise ValueError(
            f"seeds holds {unknown[0]}; it must be of those of the plan: {', '.join(map(str, plan.seeds))}"
        )
    runs = [run for run in plan.runs() if seeds is None or run.seed in seeds]
    for run in runs:
        _check_settings(run, folder / run.name)
    waiting = [run for run in runs if not (folder / run.name / RESULTS).exists()]
    if is_first_process():
        print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before", flush=True)
    return waiting


def record_settings(run: PlannedRun, folder: Path) -> None:
    """Write the settings of a run to its folder, where they are compared with those of a later one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(dict(run.settings), indent=2) + "\n")


def _check_settings(run: PlannedRun, folder: Path) -> None:
    file = folder / SETTINGS
    if not file.exists():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in {**before, **run.settings} if before.get(name) != run.settings.get(name)]
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)!r}, is {run.settings.get(name)!r}" for name in changed)
        raise ValueError(f"{folder} holds a run with other settings ({listed}); remove it, or name another folder")


def _train(run: PlannedRun, recipe: Path | str, folder: Path, launch: str) -> str | None:
    """Train a run in a process of its own, and return the end of its log if that failed."""
    record_settings(run, folder)
    flags = as_flags({**run.settings, "output_dir": str(folder)})
    if get_last_checkpoint(folder) is not None:
        flags += ["--resume_from_checkpoint", "last"]
    with open(folder / LOG, "a", encoding="utf-8") as log:
        code = run_to_end([*_command(recipe, launch), *flags], log)
    if code == 0 and (folder / RESULTS).exists():
        if "save_total_limit" not in run.settings:
            remove_checkpoints(folder)
        return None
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    lines = [line for line in lines if line.startswith("error: ")] or lines  # a launcher adds a trace of its own
    return "\n".join(
        [f"    {line[-300:]}" for line in lines[-SHOWN_LINES:]] + [f"    exit code {code}; see {folder / LOG}"]
    )


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run that is finished, each of which is larger than its model; the model is kept."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)


def _command(recipe: Path | str, launch: str) -> list[str]:
    """Return the words that start a recipe; accelerate's launcher is that of this Python, whatever PATH names."""
    words = shlex.split(launch)
    if words[:1] == ["accelerate"]:
        words[:1] = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    return [*words, str(recipe)] if isinstance(recipe, Path) else [*words, "-m", recipe]


def _result(run: PlannedRun, folder: Path) -> Result:
    return load_runs(folder / run.name)[0].result


def summarise(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Return a record of each finished run of a plan."""
    records = []
    for run in plan.runs():
        if not (folder / run.name / RESULTS).exists():
            continue
        result = _result(run, folder)
        records.append(
            {
                "row": run.row,
                "column": run.column,
                "seed": run.seed,
                "top1": result.top1,
                "top5": result.top5,
                "steps": result.steps,
                "seconds": round(result.seconds, 3),
                "peak_memory": round(result.peak_memory),
                "settings": dict(run.settings),
            }
        )
    return records


def _cells(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Return the records of each row in each column."""
    rows, columns = (dict.fromkeys(record[key] for record in records) for key in ("row", "column"))
    cells = {row: {column: [] for column in columns} for row in rows}
    for record in records:
        cells[record["row"]][record["column"]].append(record)
    return cells


def summary_table(records: Sequence[Record]) -> str:
    """Return top-1 accuracy in %, mean and sample deviation over the seeds, as a Markdown table.

    With a single column the other measures are beside it, and the gain over the first row in runs of the same seed,
    with its 95 % interval.
    """
    cells = _cells(records)
    first_row, (column, *others) = next(iter(cells.items()))
    if others:
        body = [[row, *map(_accuracy, own.values())] for row, own in cells.items()]
        return markdown_table(["top-1 %", column, *others], body)
    first = {record["seed"]: record for record in cells[first_row][column]}
    body = []
    for row, by_column in cells.items():
        own = by_column[column]
        gains = paired_differences(records, row, first_row)
        times = [r["seconds"] / first[r["seed"]]["seconds"] for r in own if r["seed"] in first]
        body.append(
            [
                row,
                str(len(own)),
                _accuracy(own),
                interval(gains) if gains and row != first_row else "",
                str(own[0]["steps"]),
                f"{fmean(times):.2f}" if times else "",
            ]
        )
    return markdown_table(["", "seeds", "top-1 %", "gain, 95 %", "steps", "time"], body)


def _accuracy(records: Sequence[Record]) -> str:
    return spread([100 * record["top1"] for record in records], 2) if records else ""


def train_and_report(plan: Plan, folder: Path, launch: str, seeds: Sequence[int] | None = None) -> None:
    """Train a plan by `train_all`, and write and print its results so far, also after an interruption.

    Raises:
        SystemExit: runs failed.
    """
    try:
        failed = train_all(plan, folder, launch, seeds)
    finally:
        report(plan, folder)
    if failed:
        raise SystemExit(f"error: {len(failed)} runs failed: {', '.join(run.name for run in failed)}")


def report(plan: Plan, folder: Path) -> None:
    """Print the table of the finished runs and what follows, and write both, the data and a plot."""
    records = summarise(plan, folder)
    if not records:
        return
    text = "\n\n".join(filter(None, (summary_table(records), plan.conclusion(records))))
    (folder / SUMMARY).write_text(json.dumps(records, indent=1) + "\n")
    (folder / TABLE).write_text(text + "\n")
    written = [TABLE, SUMMARY]
    if can_plot():
        cells = _cells(records)
        columns = dict.fromkeys(record["column"] for record in records)
        panels = {c: [[record["top1"] for record in own[c]] for own in cells.values()] for c in columns}
        plot_spreads(list(cells), panels, folder / PLOT)
        written.append(PLOT)
    else:
        print(f"\n{PLOT} is not written: {NEEDS_MATPLOTLIB}")
    print(f"\n{text}\n\nwrote {', '.join(written)} to {folder}")


def flag_settings(flags: Sequence[str]) -> dict[str, Any]:
    """Return further flags of the recipe, such as `--dataset_name DIR --use_cpu`, as settings."""
    settings: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            words = settings[word.removeprefix("--")] = []
        elif not settings:
            raise ValueError(f"{word!r} follows no flag")
        else:
            words.append(word)
    return {name: words if len(words) > 1 else (words or ["true"])[0] for name, words in settings.items()}
