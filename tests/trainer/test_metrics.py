import json

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from gradaug_hf.trainer.metrics import mean_average_precision, topk_accuracy
from gradaug_hf.trainer.running_means import RunningMeans


def test_top1_and_top5_count_the_labels_among_the_largest_logits():
    logits = np.zeros((4, 8), dtype=np.float32)
    logits[:] = np.arange(8)  # classes 7, 6, 5, 4, 3 are the five largest
    metrics = topk_accuracy(EvalPrediction(predictions=logits, label_ids=np.array([7, 6, 3, 2])))
    assert metrics == {"top1": 0.25, "top5": 0.75}


def test_logits_may_be_the_first_of_several_outputs_and_classes_few():
    logits = np.array([[1.0, 2.0], [3.0, 0.0]])
    metrics = topk_accuracy(EvalPrediction(predictions=(logits, None), label_ids=np.array([1, 1])))
    assert metrics == {"top1": 0.5}  # every label is among the best five of two classes


@pytest.mark.parametrize(("classes", "names"), [(2, {"top1"}), (5, {"top1"}), (6, {"top1", "top5"})])
def test_top5_is_measured_with_more_than_five_classes_alone(classes: int, names: set[str]):
    logits = np.eye(3, classes)
    assert set(topk_accuracy(EvalPrediction(predictions=logits, label_ids=np.array([0, 1, 0])))) == names


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"logits \(2, 3\) and labels \(2, 3\); expected \(N, classes\) and \(N,\)"):
        topk_accuracy(EvalPrediction(predictions=np.zeros((2, 3)), label_ids=np.zeros((2, 3))))


def test_logits_that_are_nan_are_no_accuracy():
    logits = np.array([[1.0, np.nan], [3.0, 0.0], [np.nan, np.nan]])
    with pytest.raises(ValueError, match="the logits of 2 of 3 images are NaN"):
        topk_accuracy(EvalPrediction(predictions=logits, label_ids=np.array([0, 0, 0])))
    masked = np.array([[1.0, -np.inf], [-np.inf, 0.0]])
    assert topk_accuracy(EvalPrediction(predictions=masked, label_ids=np.array([0, 0])))["top1"] == 0.5


def test_running_means_start_again_when_taken():
    means = RunningMeans()
    for loss, width in ((1.0, 0.5), (2.0, 1.0), (6.0, 0.9)):
        means.add(loss=torch.tensor(loss))
        means.add(width=width)
    means.add(width=0.4)
    taken = means.take()
    assert isinstance(taken["loss"], torch.Tensor)
    assert taken["loss"].item() == 3.0
    assert taken["width"] == pytest.approx(0.7)
    assert means.take() == {}
    means.add(loss=torch.tensor(5.0))
    assert means.take()["loss"].item() == 5.0


def test_running_means_go_on_from_their_state_exactly():
    whole, first = RunningMeans(), RunningMeans()
    values = [0.1, 0.7, 1e-9]
    for means in (whole, first):
        for value in values:
            means.add(loss=torch.tensor(value), precise=torch.tensor(value, dtype=torch.float64), width=value)
    rest = RunningMeans()
    rest.load(json.loads(json.dumps(first.state())), torch.device("cpu"))
    for means in (whole, rest):
        means.add(loss=torch.tensor(0.3), precise=torch.tensor(0.3, dtype=torch.float64), width=0.3)
    found, expected = rest.take(), whole.take()
    assert found == expected
    assert [found[name].dtype for name in ("loss", "precise")] == [torch.float32, torch.float64]


def test_mean_average_precision_is_that_of_scikit_learn_with_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    for images in (5, 40):
        logits = random.integers(0, 4, (images, 6)).astype(np.float32)
        labels = (random.random((images, 6)) < 0.4).astype(np.float32)
        labels[:, 2] = 0  # a class that no image has
        labels[0, [0, 1, 3, 4, 5]] = 1
        found = mean_average_precision(EvalPrediction(predictions=(logits, None), label_ids=labels))
        others = [0, 1, 3, 4, 5]
        expected = metrics.average_precision_score(labels[:, others], logits[:, others], average="macro")
        assert found == {"map": pytest.approx(expected, abs=1e-12)}


def test_mean_average_precision_by_hand():
    logits, labels = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), np.array([[1, 0], [0, 1], [1, 1]])
    found = mean_average_precision(EvalPrediction(predictions=logits, label_ids=labels))
    assert found["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3)), np.zeros(2), r"logits \(2, 3\) and labels \(2,\)"),
        (np.zeros((2, 3)), np.full((2, 3), 0.5), "not all 0 or 1"),
        (np.zeros((2, 3)), np.zeros((2, 3)), "no image of the evaluation has a class"),
        (np.full((2, 3), np.nan), np.ones((2, 3)), "the logits of 2 of 2 images are NaN"),
    ],
)
def test_labels_and_logits_without_an_average_precision_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        mean_average_precision(EvalPrediction(predictions=logits, label_ids=labels))
