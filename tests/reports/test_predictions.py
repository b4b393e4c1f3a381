import csv

import numpy as np
import pytest

from gradaug_hf.reports.predictions import (
    ClassResult,
    Predictions,
    class_results,
    class_table,
    confusion_matrix,
    predictions_of,
    worst_mistakes,
    write_class_results,
)

NAMES = ["ant", "bee", "cat"]
# Predicted: ant, bee, ant, bee, ant
PROBABILITIES = np.array([[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0.6, 0.4, 0], [0.3, 0.5, 0.2], [0.8, 0.05, 0.15]])
FIVE = Predictions(PROBABILITIES, np.array([0, 1, 1, 0, 1]), NAMES)


def test_probabilities_are_the_softmax_of_logits_of_any_size():
    found = predictions_of(np.array([[1000.0, 1000.0, 0.0], [np.log(2), 0, 0]], np.float32), np.array([0, 0]), NAMES)
    np.testing.assert_allclose(found.probabilities, [[0.5, 0.5, 0], [0.5, 0.25, 0.25]], atol=1e-7)


def test_rows_of_the_confusion_matrix_are_true_classes():
    assert confusion_matrix(FIVE).tolist() == [[1, 1, 0], [2, 1, 0], [0, 0, 0]]


def test_each_class_has_its_accuracy_and_the_class_it_is_taken_for():
    ant, bee, cat = class_results(FIVE)
    assert ant == ClassResult("ant", 2, 1, "bee") and ant.accuracy == 0.5
    assert bee == ClassResult("bee", 3, 1, "ant") and bee.accuracy == pytest.approx(1 / 3)
    assert cat == ClassResult("cat", 0, 0) and cat.accuracy is None


def test_the_most_wrong_come_first_and_right_ones_never():
    assert worst_mistakes(FIVE) == [4, 3, 2]  # true classes with 0.05, 0.3 and 0.4
    assert worst_mistakes(FIVE, 1) == [4]


def test_classes_are_written_with_all_their_numbers(tmp_path):
    write_class_results(class_results(FIVE), tmp_path / "classes.csv")
    with (tmp_path / "classes.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["class", "images", "correct", "accuracy", "most_often_taken_for"]
    assert rows == [["ant", "2", "1", "0.5000", "bee"], ["bee", "3", "1", "0.3333", "ant"], ["cat", "0", "0", "", ""]]


def test_a_table_of_many_classes_has_the_least_accurate():
    results = [ClassResult(f"class {n}", 100, n) for n in range(50, 0, -1)]
    lines = class_table(results).splitlines()
    assert len(lines) == 22 and lines[2].startswith("| class 1 ") and lines[-1].startswith("| class 20 ")
