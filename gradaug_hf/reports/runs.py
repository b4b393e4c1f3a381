"""Results of finished runs, from which tables and plots are made."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """Accuracy and cost of one training run.

    Args:
        method: Name of the method.
        top1: Top-1 accuracy of the final epoch, in 0..1.
        top5: Top-5 accuracy of the final epoch, in 0..1; None with five classes or fewer.
        steps: Steps of the optimiser.
        seconds: Time of training, without that of evaluation.
        peak_memory: Peak memory while training, in mebibytes.
        curve: Step and top-1 accuracy in 0..1 at each evaluation.
        widths: Width, top-1 and top-5 accuracy, as above, of each sub-network that was evaluated.
    """

    method: str
    top1: float
    top5: float | None
    steps: int
    seconds: float
    peak_memory: float
    curve: list[tuple[int, float]]
    widths: list[tuple[float, float, float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A result and the settings that distinguish it from others.

    Args:
        model: Name of the model.
        data: Name of the dataset.
        seed: Seed of the run.
        result: Accuracy and cost.
        file: Where it was read.
    """

    model: str
    data: str
    seed: int
    result: Result
    file: Path
