import math

import pytest
import torch

from gradaug_hf.objective.losses import check_labels, cross_entropy, soft_target_divergence

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.25, 3.0]], dtype=torch.float64)


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


def test_cross_entropy_of_class_indices_is_the_mean_negative_log_probability():
    expected = -(log_softmax(LOGITS[0].tolist())[1] + log_softmax(LOGITS[1].tolist())[2]) / 2
    assert cross_entropy(LOGITS, torch.tensor([1, 2])).item() == pytest.approx(expected, abs=1e-14)


def test_cross_entropy_of_probabilities_weights_the_log_probabilities():
    soft = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.9, 0.1]], dtype=torch.float64)
    rows = [log_softmax(row) for row in LOGITS.tolist()]
    expected = -sum(p * x for ps, xs in zip(soft.tolist(), rows, strict=True) for p, x in zip(ps, xs, strict=True)) / 2
    assert cross_entropy(LOGITS, soft).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("soft", [False, True])
def test_label_smoothing_spreads_its_share_over_all_classes(soft: bool):
    labels = torch.tensor([1, 2])
    target = 0.7 * torch.eye(3, dtype=torch.float64)[labels] + 0.3 / 3
    labels = torch.eye(3)[labels] if soft else labels
    assert cross_entropy(LOGITS, labels, 0.3).item() == pytest.approx(cross_entropy(LOGITS, target).item(), abs=1e-7)


def test_divergence_is_that_of_the_formula_averaged_over_the_batch():
    other = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
    expected = 0.0
    for q_row, p_row in zip(LOGITS.tolist(), other.tolist(), strict=True):
        for log_q, log_p in zip(log_softmax(q_row), log_softmax(p_row), strict=True):
            expected += math.exp(log_p) * (log_p - log_q) / 2
    assert soft_target_divergence(LOGITS, other).item() == pytest.approx(expected, abs=1e-14)


def test_divergence_of_equal_predictions_is_zero_even_when_a_probability_underflows():
    logits = torch.tensor([[0.0, -1000.0, 300.0]])
    assert soft_target_divergence(logits, logits).item() == 0.0


def test_no_gradient_reaches_the_soft_target():
    predicted, target = LOGITS.clone().requires_grad_(), LOGITS.flip(0).clone().requires_grad_()
    soft_target_divergence(predicted, target).backward()
    assert target.grad is None
    assert predicted.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_under_autocast_are_computed_in_float32(dtype: torch.dtype):
    logits, target = LOGITS.to(dtype), LOGITS.flip(0).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [cross_entropy(logits, torch.tensor([0, 1])), soft_target_divergence(logits, target)]
    expected = [cross_entropy(logits.double(), torch.tensor([0, 1])), soft_target_divergence(logits.double(), target)]
    for loss, reference in zip(losses, expected, strict=True):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(reference.item(), abs=1e-6)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 3]), r"label 3 is out of range; the network has classes 0\.\.2"),
        (torch.tensor([-1, 0]), r"label -1 is out of range"),
        (torch.tensor([0.0, 1.0]), r"soft labels have shape \(2,\); expected \(N, 3\)"),
        (torch.rand(2, 4), r"soft labels have shape \(2, 4\); expected \(N, 3\)"),
        (torch.tensor([[0], [1]]), r"labels have shape \(2, 1\)"),
        (torch.tensor([True, False]), r"dtype torch.bool"),
        (torch.tensor([0, 1, 2]), r"logits of shape \(2, 3\); expected \(3, classes\)"),
    ],
)
def test_wrong_labels_are_named(labels: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        cross_entropy(LOGITS, labels)


def test_logits_of_a_wrong_shape_are_named():
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3, 1\); expected \(2, classes\)"):
        cross_entropy(LOGITS[..., None], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"shape \(1, 3\), the full network's \(2, 3\)"):
        soft_target_divergence(LOGITS[:1], LOGITS)


def test_labels_on_another_device_are_not_read():
    check_labels(torch.tensor([0, 99], device="meta"), 3)  # would raise if values were asked for: there are none
