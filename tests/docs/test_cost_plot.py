import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "docs" / "cost_plot.py"
SPEC = importlib.util.spec_from_file_location("cost_plot", FILE)
cost_plot = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cost_plot)


def records(row: str, top1: list[float], steps: int = 100, **settings) -> list[dict]:
    return [
        {"row": row, "seed": seed, "top1": each, "steps": steps, "settings": settings}
        for seed, each in enumerate(top1)
    ]


def test_points_have_the_arithmetic_of_the_training_and_the_mean_gain_of_common_seeds():
    found = cost_plot.points(
        records("plain", [0.5, 0.6, 0.7], method="baseline")
        + records("longer", [0.5, 0.6, 0.76], steps=160, method="baseline")
        + records("parts", [0.51, 0.62, 0.73], min_width=0.8, resolutions=[32, 28, 24], subnet_images="split")
        + records("two seeds", [0.9, 0.9], num_subnets=0)
    )
    assert [point.row for point in found] == ["parts", "longer"]
    # a third of the batch for the width 0.8 and two widths of U(0.8, 1), on images of 1, 7/8 and 3/4 of the side
    expected = 1 + (0.8**2 + 2 * (1 + 0.8 + 0.64) / 3) * (1 + (7 / 8) ** 2 + (3 / 4) ** 2) / 3 / 3
    assert [point.cost for point in found] == pytest.approx([expected, 1.6])
    assert [point.gain for point in found] == pytest.approx([2, 2])


def test_each_plot_has_records_of_plain_training_and_of_others():
    for panel in cost_plot.PANELS:
        assert cost_plot.points(cost_plot.records_of(panel.file, panel.column))
