"""The measurements in `trainer.state.log_history`, read for plots and the model card."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Names that a Trainer logs beside what `compute_metrics` returned.
SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
LOSS = "loss"
TITLES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "map": "mean average precision"}

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model at one width.

    Args:
        step: steps of the optimiser before it.
        epoch: passes over the training images before it.
        metrics: `loss` and what `compute_metrics` returned, by name.
        width: width multiplier of the model.
        data: name of the evaluation set, where there are several.
    """

    step: int
    epoch: float
    metrics: Mapping[str, float]
    width: float = 1.0
    data: str | None = None


def training_log(history: Iterable[Entry]) -> list[Entry]:
    """Return the entries of a history that training logged."""
    return [entry for entry in history if LOSS in entry]


def evaluations(history: Iterable[Entry], data: Sequence[str] = ()) -> list[Evaluation]:
    """Return the evaluations of a history in their order, and the last one where there are several at a step.

    Args:
        history: of a Trainer whose metrics start with `eval`.
        data: names of the evaluation sets, where `eval_dataset` is a dictionary of them.
    """
    found: dict[tuple, Evaluation] = {}
    for entry in history:
        metrics: dict[tuple, dict[str, float]] = {}
        for name, value in entry.items():
            if name.startswith("eval_") and isinstance(value, (int, float)):
                place, metric = _split_name(name.removeprefix("eval_"), data)
                if metric not in SPEED:
                    metrics.setdefault(place, {})[metric] = value
        for (name, width), values in metrics.items():
            evaluation = Evaluation(entry["step"], entry.get("epoch", 0.0), values, width, name)
            found.pop((entry["step"], name, width), None)
            found[entry["step"], name, width] = evaluation
    return list(found.values())


def at_step(measured: Iterable[Evaluation], step: int) -> list[Evaluation]:
    """Return the evaluations after a number of steps, for each set from the full width to the narrowest."""
    return sorted((e for e in measured if e.step == step), key=lambda e: (e.data or "", -e.width))


def shares(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are shares in 0..1, such as accuracies."""
    return {name: value for name, value in metrics.items() if name != LOSS and 0 <= value <= 1}


def title(metric: str) -> str:
    """Return a metric's name as it is shown."""
    return TITLES.get(metric, metric.replace("_", " "))


def _split_name(name: str, data: Sequence[str]) -> tuple[tuple[str | None, float], str]:
    """Return the evaluation set and the width that a name stands for, and the metric."""
    found = next((s for s in sorted(data, key=len, reverse=True) if name.startswith(f"{s}_")), None)
    name = name if found is None else name.removeprefix(f"{found}_")
    narrower = re.fullmatch(r"width([\d.e-]+)_(.+)", name)
    return ((found, float(narrower[1])), narrower[2]) if narrower else ((found, 1.0), name)
