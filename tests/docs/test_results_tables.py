import json
import sys
from pathlib import Path

import pytest

from gradaug_hf.experiments.sweep import summary_table
from gradaug_hf.reports.differences import by_column, differences_table

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")


@pytest.fixture
def results_tables(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import results_tables

    yield results_tables
    for name in ("results_tables", "cost_plot"):
        sys.modules.pop(name)


def records(row: str, top1: list[float], steps: int = 100, **settings) -> list[dict]:
    return [
        {"row": row, "seed": seed, "top1": each, "steps": steps, "settings": settings}
        for seed, each in enumerate(top1)
    ]


def test_a_row_has_cost_seeds_accuracy_and_differences_to_others(results_tables):
    found = results_tables.rows_table(
        records("plain", [0.5, 0.6, 0.7], method="baseline")
        + records("longer", [0.51, 0.62, 0.73], steps=160, method="baseline")
        + records("CutMix", [0.9], method="cutmix"),
        ("plain",),
    )
    # the differences 1, 2, 3 have the deviation 1, and Student's t of two degrees is 4.303
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()[2:]] == [
        ["plain", "1.00", "3", "60.00 ± 10.00", ""],
        ["longer", "1.60", "3", "62.00 ± 11.00", "+2.00 ± 2.48"],
    ]


def test_the_page_has_the_tables_of_its_records(results_tables):
    for table in results_tables.TABLES:
        assert results_tables.table(table) in PAGE, f"python docs/results_tables.py prints another table for {table}"


@pytest.mark.parametrize("file", ["fine_tuning_photos", "fine_tuning_cifar10"])
def test_the_page_has_the_table_of_fine_tuning_and_its_differences(file):
    found = json.loads((DOCS / "results" / f"{file}.json").read_text(encoding="utf-8"))
    assert summary_table(found) in PAGE
    for line in differences_table(found, "GradAug", ["plain", "plain, 15 epochs"]).splitlines()[2:]:
        assert [cell.strip() for cell in line.split("|")] in [
            [cell.strip() for cell in own.split("|")] for own in PAGE.splitlines()
        ]


def test_records_of_a_file_name_each_run_once():
    for file in (DOCS / "results").glob("*.json"):
        for own in by_column(json.loads(file.read_text(encoding="utf-8"))).values():
            runs = [(record["row"], record["seed"]) for record in own]
            assert len(runs) == len(set(runs)), file.name
