import math

import pytest
import torch

from gradaug_hf.objective.class_weights import balanced_weights, weighted_cross_entropy
from gradaug_hf.objective.losses import cross_entropy

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.25, 3.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)


def test_balanced_weights_are_the_mean_count_over_that_of_the_class():
    # 6 images of 2 classes that have any: 3 each on average
    assert balanced_weights([0, 0, 0, 0, 2, 2], 3).tolist() == pytest.approx([3 / 4, 0.0, 3 / 2])


def test_balanced_weights_have_the_mean_1_over_the_images():
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    assert balanced_weights(labels, 3)[labels].mean().item() == pytest.approx(1)


def test_each_image_counts_as_much_as_its_class_weighs():
    def surprise(row: list[float], label: int) -> float:
        return math.log(sum(math.exp(x) for x in row)) - row[label]

    expected = (2.0 * surprise([2.0, 0.0, -1.0], 1) + 4.0 * surprise([0.5, 0.25, 3.0], 2)) / 2
    found = weighted_cross_entropy(LOGITS, torch.tensor([1, 2]), WEIGHTS, 0.0)
    assert found.item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("soft", [False, True])
def test_weights_of_1_are_the_cross_entropy_with_label_smoothing(soft: bool):
    labels = torch.tensor([1, 2])
    labels = torch.eye(3)[labels] if soft else labels
    found = weighted_cross_entropy(LOGITS, labels, torch.ones(3), 0.3)
    assert found.item() == pytest.approx(cross_entropy(LOGITS, labels, 0.3).item(), abs=1e-14)


def test_a_mixed_label_weighs_the_mean_of_its_classes():
    mixed = torch.tensor([[0.25, 0.75, 0.0]])
    found = weighted_cross_entropy(LOGITS[:1], mixed, WEIGHTS, 0.0)
    assert found.item() == pytest.approx((0.25 * 0.5 + 0.75 * 2.0) * cross_entropy(LOGITS[:1], mixed).item())


def test_a_batch_is_the_mean_of_its_halves():
    logits, labels = (
        torch.randn(8, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 2, 2, 2, 0, 0, 0]),
    )
    halves = [weighted_cross_entropy(logits[rows], labels[rows], WEIGHTS, 0.1) for rows in (slice(4), slice(4, 8))]
    whole = weighted_cross_entropy(logits, labels, WEIGHTS, 0.1)
    assert whole.item() == pytest.approx(sum(halves).item() / 2)
