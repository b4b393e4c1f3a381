import math

import pytest
from scipy.stats import t

from gradaug_hf.reports.differences import (
    differences_table,
    half_interval,
    interval,
    paired_differences,
    points_told_apart,
    students_t,
    verdict,
)

RECORDS = [
    {"row": "plain", "seed": 0, "top1": 0.40},
    {"row": "plain", "seed": 1, "top1": 0.42},
    {"row": "plain", "seed": 2, "top1": 0.39},
    {"row": "split", "seed": 2, "top1": 0.40},
    {"row": "split", "seed": 0, "top1": 0.43},
    {"row": "split", "seed": 1, "top1": 0.44},
    {"row": "split", "seed": 7, "top1": 0.99},
]


def records_of(**rows: list[float]) -> list[dict]:
    return [
        {"row": row, "seed": seed, "top1": top1 / 100} for row, runs in rows.items() for seed, top1 in enumerate(runs)
    ]


def test_rows_are_compared_in_runs_of_the_same_seed():
    assert paired_differences(RECORDS, "split", "plain") == pytest.approx([3, 2, 1])


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 30, 101])
def test_students_t_is_that_of_scipy(degrees: int):
    assert students_t(degrees) == pytest.approx(t.ppf(0.975, degrees), rel=1e-9)


def test_the_interval_is_that_of_students_t():
    assert interval([3.0, 2.0, 1.0]) == "+2.00 ± 2.48"  # 4.3027 of two degrees of freedom, times 1 / sqrt(3)
    assert half_interval([3.0, 2.0, 1.0]) == pytest.approx(4.302653 / math.sqrt(3))
    assert interval([1.5]) == "+1.50, one seed"
    assert interval([]) == "no common seed"


def test_the_table_says_how_many_seeds_gain_for_each_column():
    table = differences_table(RECORDS, "split", ["plain"])
    assert table.splitlines()[-1] == "| split over plain |          3 of 3 |         +2.00 ± 2.48 |"
    both = [{**r, "column": column} for column in ("250", "1000") for r in RECORDS]
    names = [line.split("|")[1].strip() for line in differences_table(both, "split", ["plain"]).splitlines()[2:]]
    assert names == ["split over plain, 250", "split over plain, 1000"]


@pytest.mark.parametrize(
    ("images", "accuracy", "expected"),
    [
        (98, 0.5, 14.0),  # 1.96 sqrt(2 · 0.5 · 0.5 / 98)
        (10_000, 0.9, 0.83),  # 1.96 sqrt(2 · 0.9 · 0.1 / 10,000)
        (8, 1.0, 29.4),  # 1.96 sqrt(2 · 0.9 · 0.1 / 8), as p is 9 of 10
    ],
)
def test_what_images_tell_apart_is_the_formula(images: int, accuracy: float, expected: float):
    assert points_told_apart(images, accuracy) == pytest.approx(expected, abs=0.01)


OTHERS = {"plain": "plain training", "long": "plain training of equal compute"}


@pytest.mark.parametrize(
    ("ours", "plain", "long", "images", "expected"),
    [
        (
            # differences 1, 2, 3 (± 2.48) and 1, 0, 2 (± 2.48); p = 0.91 and n = 240 give 5.1 points
            [91, 92, 93], [90, 90, 90], [90, 92, 91], 240,
            "ours gains 2.0 ± 2.5 points over plain training and 1.0 ± 2.5 over plain training of equal compute: not "
            "told apart; 240 evaluation images tell apart about 5 points",
        ),
        (
            # the interval leaves out zero, but other 100 images may have it otherwise
            [92, 92.1, 92.2], [91, 91, 91], [91, 91, 91], 100,
            "ours gains 1.1 ± 0.2 points over plain training and 1.1 ± 0.2 over plain training of equal compute: not "
            "told apart; 100 evaluation images tell apart about 8 points",
        ),
        (
            [92, 92.1, 92.2], [91, 91, 91], [92, 92.5, 92], 1_000_000,
            "ours gains 1.1 ± 0.2 points over plain training and -0.1 ± 0.8 over plain training of equal compute: "
            "told apart from plain training alone; 1,000,000 evaluation images tell apart about 0.08 points",
        ),
        (
            [88, 88.1, 88.2], [91, 91, 91], [91, 91, 91], 10_000,
            "ours gains -2.9 ± 0.2 points over plain training and -2.9 ± 0.2 over plain training of equal compute: "
            "told apart; 10,000 evaluation images tell apart about 0.8 points",
        ),
        (
            [91], [91.04], [], 10_000,
            "ours gains 0.0 points over plain training with one seed: not told apart; 10,000 evaluation images tell "
            "apart about 0.8 points",
        ),
        (
            [92], [50], [], 10_000,
            "ours gains 42.0 points over plain training with one seed: not told apart; 10,000 evaluation images tell "
            "apart about 1 points",
        ),
    ],
)  # fmt: skip
def test_the_verdict_says_what_seeds_and_images_tell_apart(ours, plain, long, images: int, expected: str):
    assert verdict(records_of(ours=ours, plain=plain, long=long), "ours", OTHERS, images) == expected


def test_there_is_no_verdict_without_a_common_seed():
    assert verdict(records_of(plain=[90.0]), "ours", OTHERS, 100) is None
