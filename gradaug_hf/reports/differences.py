"""Do results differ? Paired differences over seeds with their intervals, and what so many images can tell apart."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gradaug_hf.utils.tables import markdown_table

LEVEL = 0.95
Record = Mapping[str, Any]


def paired_differences(records: Sequence[Record], row: str, other: str) -> list[float]:
    """Return the differences in percentage points of the seeds that both rows have.

    Args:
        records: of a sweep, with `row`, `seed` and `top1` in 0..1.
        row: name of a row.
        other: name of the row that is subtracted.
    """
    own, its = ({r["seed"]: 100 * r["top1"] for r in records if r["row"] == name} for name in (row, other))
    return [own[seed] - its[seed] for seed in sorted(own.keys() & its.keys())]


def half_interval(differences: Sequence[float]) -> float | None:
    """Return half of the width of the 95 % interval of a mean, by Student's t; None with fewer than two values."""
    if len(differences) < 2:
        return None
    return students_t(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))


def students_t(degrees: int) -> float:
    """Return the value that Student's t exceeds, up or down, in 5 % of cases.

        >>> round(students_t(2), 3)
        4.303

    Args:
        degrees: of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _share_below(angle, degrees) < LEVEL else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _share_below(angle: float, degrees: int) -> float:
    """Return the probability of |t| < sqrt(degrees) tan(angle) (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= (2 * k - 1 + odd) / (2 * k + odd) * math.cos(angle) ** 2
    share = math.sin(angle) * total
    return 2 / math.pi * (angle + share) if odd else share


def interval(differences: Sequence[float], digits: int = 2) -> str:
    """Return the mean of some differences with half of the width of its 95 % interval, where there are several."""
    if not differences:
        return "no common seed"
    mean, half = f"{statistics.mean(differences):+.{digits}f}", half_interval(differences)
    return f"{mean}, one seed" if half is None else f"{mean} ± {half:.{digits}f}"


def differences_table(records: Sequence[Record], row: str, others: Sequence[str]) -> str:
    """Return a Markdown table of the differences between one row and others, for each column of the records.

    Args:
        records: as for `paired_differences`, of one column or with `column`.
        row: name of the row.
        others: names of the rows that it is compared with.
    """
    lines = []
    for column, own in by_column(records).items():
        for other in others:
            differences = paired_differences(own, row, other)
            gained = f"{sum(difference > 0 for difference in differences)} of {len(differences)}"
            name = f"{row} over {other}" + (f", {column}" if column else "")
            lines.append((name, gained, interval(differences)))
    return markdown_table(("", "seeds that gain", "difference in points"), lines)


def by_column(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return records by their column, in its order; those of no column by an empty name."""
    columns: dict[str, list[Record]] = {}
    for record in records:
        columns.setdefault(record.get("column", ""), []).append(record)
    return columns


def points_told_apart(images: int, accuracy: float) -> float:
    """Return the difference in percentage points that so many images can tell apart.

    A difference of two models varies with the images by sqrt(d / n), where d is the share of the n images that only
    one of the two gets right, as in McNemar's test. Models of accuracy p that err independently have d = 2 p (1 - p),
    and models that err alike less, so that 1.96 sqrt(2 p (1 - p) / n) is rather too much than too little. p is that
    with one more image that is right and one that is wrong, without which a model that makes no mistake would seem
    certain.

        >>> round(points_told_apart(240, 0.94), 1)
        4.4

    Args:
        images: number of the images that both models are evaluated on.
        accuracy: mean accuracy of the models, in 0..1.
    """
    p = (images * accuracy + 1) / (images + 2)
    return 100 * statistics.NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(2 * p * (1 - p) / images)


def verdict(records: Sequence[Record], row: str, others: Mapping[str, str], images: int) -> str | None:
    """Return in one sentence whether a row is better than others; None where they have no seed in common.

    A row is told apart from another where the interval of their difference leaves out zero, and the difference is at
    least what the images can tell apart: with the same images for each seed, the interval does not say how far others
    would have it differ.

    Args:
        records: as for `paired_differences`, of one column.
        row: name of the row.
        others: name of a row that it is compared with -> what it is called.
        images: number of the images that each run was evaluated on.
    """
    gains, limits, apart = [], [], []
    for other, words in others.items():
        differences = paired_differences(records, row, other)
        if not differences:
            continue
        gain, half = statistics.mean(differences), half_interval(differences)
        accuracy = statistics.mean(record["top1"] for record in records if record["row"] in (row, other))
        limits.append(points_told_apart(images, accuracy))
        if half is not None and abs(gain) > half and abs(gain) >= limits[-1]:
            apart.append(words)
        gain = round(gain, 1) + 0.0  # not -0.0
        shown = f"{gain:.1f}" if half is None else f"{gain:.1f} ± {half:.1f}"
        gains.append(f"{shown}{'' if gains else ' points'} over {words}{' with one seed' if half is None else ''}")
    if not gains:
        return None
    found = "not told apart"
    if apart:
        found = "told apart" if len(apart) == len(gains) else f"told apart from {' and '.join(apart)} alone"
    limit = f"{max(limits):.0f}" if max(limits) >= 1 else f"{max(limits):.1g}"
    return f"{row} gains {' and '.join(gains)}: {found}; {images:,} evaluation images tell apart about {limit} points"
