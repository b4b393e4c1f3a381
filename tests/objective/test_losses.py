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
        (torch.tensor([0, 3]), r"label 3 is out of range; the model has classes 0\.\.2"),
        (torch.tensor([-1, 0]), r"label -1 is out of range"),
        (torch.tensor([0.0, 1.0]), r"soft labels have shape \(2,\); expected \(N, 3\)"),
        (torch.tensor([3, 0], dtype=torch.uint8), r"label 3 is out of range"),
        (torch.tensor([3, 0], dtype=torch.uint16), r"label 3 is out of range"),
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), r"soft label 0 of a batch sums to 2 with smallest entry 0"),
        (torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), r"soft label 1 of a batch sums to 0"),
        (torch.tensor([[1.0, 0.0, 0.0], [2.0, -1.0, 0.0]]), r"soft label 1 .* smallest entry -1;.* .multi-label."),
        (torch.tensor([[1.0, 0.0, 0.0], [0.5, math.nan, 0.5]]), r"soft label 1 of a batch sums to nan"),
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_that_rounding_keeps_from_one_are_soft_labels(dtype):
    check_labels(torch.softmax(torch.randn(64, 1000), dim=1).to(dtype), 1000)
    check_labels((0.9 * torch.eye(1000)[:8] + 0.1 / 1000).to(dtype), 1000)


def test_labels_are_checked_without_a_number_of_classes_as_far_as_can_be():
    check_labels(torch.tensor([0, 99]))
    with pytest.raises(ValueError, match="label -1 is out of range; the model has classes from 0 on"):
        check_labels(torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="sums to 2"):
        check_labels(torch.ones(1, 2))


# ---- classes that are masked by a logit of -inf ----

MASKED = torch.tensor([[2.0, -math.inf, -1.0], [0.5, -math.inf, 3.0]], dtype=torch.float64)


def unmasked(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, [0, 2]]


def test_a_masked_class_adds_nothing_to_the_divergence():
    logits = MASKED.flip(0).clone().requires_grad_()
    reference = unmasked(logits.detach()).requires_grad_()
    loss = soft_target_divergence(logits, MASKED)
    expected = soft_target_divergence(reference, unmasked(MASKED))
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-14) and loss > 0
    torch.testing.assert_close(unmasked(logits.grad), reference.grad, rtol=0, atol=1e-14)
    assert logits.grad[:, 1].tolist() == [0, 0]


def test_a_masked_class_adds_nothing_to_the_cross_entropy():
    for labels, others in (
        (torch.tensor([[0.25, 0.0, 0.75], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])),
        (torch.tensor([0, 2]), torch.tensor([0, 1])),
    ):
        logits, reference = MASKED.clone().requires_grad_(), unmasked(MASKED).requires_grad_()
        loss, expected = cross_entropy(logits, labels), cross_entropy(reference, others)
        loss.backward()
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
        torch.testing.assert_close(unmasked(logits.grad), reference.grad, rtol=0, atol=1e-14)
        assert logits.grad[:, 1].tolist() == [0, 0]


def test_a_masked_class_that_has_probability_is_not_hidden():
    assert cross_entropy(MASKED, torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])).item() == math.inf
    assert soft_target_divergence(MASKED, LOGITS).item() == math.inf
