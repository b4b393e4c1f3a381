"""Plot docs/results/cost.png, the gain of each compared setting against what it costs: `python docs/cost_plot.py`.

It reads the records of the sweeps that lie beside it. A cost is the steps over those of plain training, times the
arithmetic of one step (`relative_cost`). A gain is the mean difference to plain training with the same seed, with its
95 % interval.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradaug_hf.experiments.cost import relative_cost
from gradaug_hf.experiments.methods import METHODS
from gradaug_hf.objective.sampling import SubnetSettings
from gradaug_hf.reports.differences import by_column, half_interval, paired_differences

RESULTS = Path(__file__).parent / "results"
PLAIN = "plain"
MIN_SEEDS = 3
CIFAR_SIDE = 32


class Panel(NamedTuple):
    """One training task: the file of its records, their column, and the title of the plot."""

    file: str
    column: str
    title: str


PANELS = (
    Panel("split_scratch", "", "from scratch: 250 labels"),
    Panel("split_labels", "", "from scratch: 1,000 labels"),
    Panel("wrn_scratch", "", "from scratch: 250 labels, wide network"),
    Panel("vit_scratch", "", "from scratch: 1,000 labels, vision transformer"),
    Panel("split_fine_tuning", "ants and bees", "fine-tuned: ants and bees"),
    Panel("split_fine_tuning", "100 labels", "fine-tuned: 100 labels"),
    Panel("split_fine_tuning", "250 labels", "fine-tuned: 250 labels"),
    Panel("split_fine_tuning", "1000 labels", "fine-tuned: 1,000 labels"),
)
COLUMNS = 4


class Point(NamedTuple):
    """Cost of a row, and its gain over plain training in points of accuracy."""

    row: str
    cost: float
    gain: float
    half_interval: float


def main() -> None:
    """Plot all panels."""
    figure = Figure(figsize=(20, 12), layout="constrained")
    found = [points(records_of(panel.file, panel.column)) for panel in PANELS]
    kinds = dict.fromkeys(kind(point.row) for own in found for point in own)
    colours = dict(zip(kinds, colormaps["tab20"].colors, strict=False))
    subplots = figure.subplots(len(PANELS) // COLUMNS, COLUMNS).flat
    for axes, panel, own in zip(subplots, PANELS, found, strict=True):
        plot(axes, panel.title, own, [colours[kind(point.row)] for point in own])
    figure.savefig(RESULTS / "cost.png", dpi=110)


def records_of(file: str, column: str) -> list[Mapping[str, Any]]:
    """Return the records of one task."""
    return by_column(json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8")))[column]


def points(records: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the points of the rows that share at least MIN_SEEDS seeds with plain training, the cheapest first."""
    first = {record["row"]: record for record in reversed(records)}
    found = []
    for row, record in first.items():
        gains = paired_differences(records, row, PLAIN)
        if row != PLAIN and len(gains) >= MIN_SEEDS:
            found.append(Point(row, cost(record, first[PLAIN]), statistics.mean(gains), half_interval(gains)))
    return sorted(found, key=lambda point: point.cost)


def cost(record: Mapping[str, Any], plain: Mapping[str, Any]) -> float:
    """Return the multiply-adds of a run over those of plain training."""
    given = {**METHODS.get(record["settings"].get("method", ""), {}), **record["settings"]}
    own = {each.name: given[each.name] for each in fields(SubnetSettings) if each.name in given}
    step = relative_cost(SubnetSettings(**own), given.get("image_size", CIFAR_SIDE))
    return step * record["steps"] / plain["steps"]


def kind(row: str) -> str:
    """Return the name that a row has in common with those of other tasks, for a colour of its own in all of them."""
    return re.sub(r"\d+ epochs", "longer", row)


def plot(axes: Axes, title: str, found: Sequence[Point], colours: Sequence[Any]) -> None:
    """Plot the points of one task, plain training at the origin, and the frontier of those that gain most so far."""
    axes.axhline(0, color="0.8", zorder=0)
    axes.plot(1, 0, "o", color="0.3")
    frontier = [(1.0, 0.0)]
    for point, colour in zip(found, colours, strict=True):
        marker = "s" if point.row.startswith(PLAIN) else "^" if "CutMix" in point.row else "o"
        interval = point.half_interval
        axes.errorbar(point.cost, point.gain, interval, fmt=marker, color=colour, capsize=3, label=point.row)
        if point.gain > frontier[-1][1]:
            frontier.append((point.cost, point.gain))
    axes.plot(*zip(*frontier, strict=True), "k--", zorder=0, drawstyle="steps-post", label="frontier")
    axes.set(title=title, xlabel="multiply-adds of the training, plain = 1", ylabel="gain over plain, points")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8)


if __name__ == "__main__":
    main()
