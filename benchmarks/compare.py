"""Compare the rows of a sweep seed by seed: paired differences of accuracy with their 95 % intervals.

    python benchmarks/compare.py docs/results/split_scratch.json "GradAug, split" "plain, 160 epochs" "GradAug"

The first row is compared with each of the others, in runs of the same seed; the interval is Student's t of the
differences. Accuracies are in percent.
"""

import argparse
import json
from pathlib import Path

from gradaug_hf.reports.differences import differences_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", type=Path, help="summary.json of a sweep")
    parser.add_argument("row", help="name of the row to compare")
    parser.add_argument("others", nargs="+", help="names of those to compare it with")
    args = parser.parse_args()
    records = json.loads(args.summary.read_text(encoding="utf-8"))
    known = list(dict.fromkeys(record["row"] for record in records))
    if unknown := [row for row in (args.row, *args.others) if row not in known]:
        parser.error(f"{args.summary} has no row {unknown[0]!r}; it has {', '.join(map(repr, known))}")
    print(differences_table(records, args.row, args.others))


if __name__ == "__main__":
    main()
