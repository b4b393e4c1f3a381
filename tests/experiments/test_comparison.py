from pathlib import Path

import pytest

from gradaug_hf.experiments.comparison import Comparison, make_comparison
from gradaug_hf.trainer.config import GradAugConfig


def comparison(tmp_path: Path, **config) -> Comparison:
    return make_comparison(
        "some.module",
        {"GradAug": {}},
        plain="plain",
        plain_settings={"num_subnets": 0},
        gradaug="GradAug",
        config=GradAugConfig(str(tmp_path), num_subnets=1, min_width=0.5, use_cpu=True, **config),
        side=32,
        seeds=[0, 1],
        settings={},
        columns={"few": {}, "all": {}},
        images=50,
    )


@pytest.mark.parametrize(
    ("length", "row", "expected"),
    [
        ({"num_train_epochs": 100}, "plain, 125 epochs", {"num_train_epochs": 125}),  # 1 + 0.5²
        ({"max_steps": 8}, "plain, 10 steps", {"max_steps": 10}),
    ],
)
def test_plain_training_of_equal_compute_is_as_much_longer_as_gradaug_costs(tmp_path, length, row, expected):
    plan = comparison(tmp_path, resolutions=[32], **length)
    assert plan.rows == {"plain": {"num_subnets": 0}, row: {"num_subnets": 0, **expected}, "GradAug": {}}


def records_of(column: str, **rows: list[float]) -> list[dict]:
    return [
        {"row": row.replace("longer", "plain, 8 epochs"), "column": column, "seed": seed, "top1": top1}
        for row, runs in rows.items()
        for seed, top1 in enumerate(runs)
    ]


def test_each_column_has_its_verdict_and_what_is_not_finished_is_left_out(tmp_path):
    plan = comparison(tmp_path, num_train_epochs=6.4, resolutions=[32])
    few = records_of("few", plain=[0.5, 0.5], longer=[0.7, 0.6], GradAug=[0.7, 0.7])
    whole = records_of("all", plain=[0.5])
    table, *sentences = plan.conclusion(few + whole).split("\n\n")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:4]] == [
        "GradAug over plain, few",
        "GradAug over plain, 8 epochs, few",
    ]
    assert sentences == [
        "few: GradAug gains 20.0 ± 0.0 points over plain training and 5.0 ± 63.5 over plain training of equal "
        "compute: told apart from plain training alone; 50 evaluation images tell apart about 19 points"
    ]
    assert plan.conclusion(whole) == ""
