"""Compare the rows of a sweep seed by seed: paired differences of accuracy with their 95 % intervals.

    python benchmarks/compare.py docs/results/split_scratch.json "GradAug, split" "plain, 160 epochs" "GradAug"

The first row is compared with each of the others, in runs of the same seed; the interval is Student's t of the
differences. Accuracies are in percent. Needs scipy, which comes with scikit-learn.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

from gradaug_hf.utils.tables import markdown_table

LEVEL = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", type=Path, help="summary.json of a sweep")
    parser.add_argument("rows", nargs="+", help="name of the row to compare, and of those to compare it with")
    args = parser.parse_args()
    records = json.loads(args.summary.read_text(encoding="utf-8"))
    known = list(dict.fromkeys(record["row"] for record in records))
    if unknown := [row for row in args.rows if row not in known]:
        parser.error(f"{args.summary} has no row {unknown[0]!r}; it has {', '.join(map(repr, known))}")
    print(differences_table(records, *args.rows))


def differences_table(records: Sequence[Mapping[str, Any]], row: str, *others: str) -> str:
    """Return a table of the differences between one row and others.

    Args:
        records: of a sweep's summary, with `row`, `seed` and `top1` in 0..1.
        row: name of the row.
        others: names of the rows that it is compared with.
    """
    lines = []
    for other in others:
        differences = paired_differences(records, row, other)
        gained = sum(difference > 0 for difference in differences)
        lines.append([f"{row} over {other}", f"{gained} of {len(differences)}", interval(differences)])
    return markdown_table(["", "seeds that gain", "difference in points"], lines)


def paired_differences(records: Sequence[Mapping[str, Any]], row: str, other: str) -> list[float]:
    """Return the differences in percentage points of the seeds that both rows have."""
    own, its = ({r["seed"]: 100 * r["top1"] for r in records if r["row"] == name} for name in (row, other))
    return [own[seed] - its[seed] for seed in sorted(own.keys() & its.keys())]


def interval(differences: Sequence[float]) -> str:
    """Return the mean of some differences with half of the width of its 95 % interval, where there are several."""
    if not differences:
        return "no common seed"
    mean = f"{statistics.mean(differences):+.2f}"
    if len(differences) == 1:
        return f"{mean}, one seed"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean} ± {t.ppf((1 + LEVEL) / 2, len(differences) - 1) * error:.2f}"


if __name__ == "__main__":
    main()
