from benchmarks.compare import differences_table, interval, paired_differences

RECORDS = [
    {"row": "plain", "seed": 0, "top1": 0.40},
    {"row": "plain", "seed": 1, "top1": 0.42},
    {"row": "plain", "seed": 2, "top1": 0.39},
    {"row": "split", "seed": 2, "top1": 0.40},
    {"row": "split", "seed": 0, "top1": 0.43},
    {"row": "split", "seed": 1, "top1": 0.44},
    {"row": "split", "seed": 7, "top1": 0.99},
]


def test_rows_are_compared_in_runs_of_the_same_seed():
    assert [round(d, 9) for d in paired_differences(RECORDS, "split", "plain")] == [3, 2, 1]


def test_the_interval_is_that_of_students_t():
    assert interval([3.0, 2.0, 1.0]) == "+2.00 ± 2.48"  # 4.3027 of two degrees of freedom, times 1 / sqrt(3)
    assert interval([1.5]) == "+1.50, one seed"
    assert interval([]) == "no common seed"


def test_the_table_says_how_many_seeds_gain():
    table = differences_table(RECORDS, "split", "plain")
    assert table.splitlines()[-1] == "| split over plain |          3 of 3 |         +2.00 ± 2.48 |"
