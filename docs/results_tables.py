"""Print the tables of docs/results.md that follow from the records beside it: `python docs/results_tables.py`.

A row has the cost of the training over that of the first row, the mean accuracy with its deviation over the seeds, and
the paired differences to other rows with their 95 % intervals.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cost_plot import cost, records_of

from gradaug_hf.experiments.results import spread
from gradaug_hf.reports.differences import Record, interval, paired_differences
from gradaug_hf.utils.tables import markdown_table


class Table(NamedTuple):
    """The file and the column of the records, the rows that each row is compared with, and which rows there are."""

    file: str
    column: str
    others: Sequence[str]
    with_cutmix: bool = False


PARTS = ("plain", "plain, 16 epochs", "GradAug")
TABLES = (
    Table("split_scratch", "", ("plain, 160 epochs", "plain, 276 epochs", "GradAug")),
    Table(
        "split_scratch",
        "",
        ("plain, 160 epochs", "CutMix, 160 epochs", "GradAug, depth on a quarter"),
        with_cutmix=True,
    ),
    Table("split_labels", "", ("plain", "plain, 64 epochs", "GradAug")),
    Table(
        "split_labels", "", ("plain, 64 epochs", "CutMix, 64 epochs", "GradAug, depth on a quarter"), with_cutmix=True
    ),
    Table("wrn_scratch", "", ("plain", "plain, 96 epochs", "GradAug")),
    Table(
        "wrn_scratch", "", ("plain, 96 epochs", "CutMix, 96 epochs", "GradAug, depth on a quarter"), with_cutmix=True
    ),
    Table("vit_scratch", "", ("plain", "plain, 64 epochs")),
    *(
        Table("split_fine_tuning", column, PARTS)
        for column in ("ants and bees", "100 labels", "250 labels", "1000 labels")
    ),
)


def main() -> None:
    """Print all tables."""
    for each in TABLES:
        print(f"{' '.join((each.file, each.column)).strip()}:\n\n{table(each)}\n")


def table(chosen: Table) -> str:
    """Return a table in Markdown."""
    return rows_table(records_of(chosen.file, chosen.column), chosen.others, chosen.with_cutmix)


def rows_table(records: Sequence[Record], others: Sequence[str], with_cutmix: bool = False) -> str:
    """Return the table of the rows with CutMix, or of those without, compared with some rows of either kind."""
    by_row: dict[str, list[Record]] = {}
    for record in records:
        by_row.setdefault(record["row"], []).append(record)
    first = records[0]
    lines = []
    for row, own in by_row.items():
        if ("CutMix" in row) != with_cutmix:
            continue
        differences = ["" if row == other else interval(paired_differences(records, row, other)) for other in others]
        accuracy = spread([100 * record["top1"] for record in own], 2)
        lines.append([row, f"{cost(own[0], first):.2f}", str(len(own)), accuracy, *differences])
    return markdown_table(
        ["top-1 %", "cost", "seeds", "mean ± deviation", *(f"over {other}" for other in others)], lines
    )


if __name__ == "__main__":
    main()
