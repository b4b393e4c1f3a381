import math

import pytest
import torch
from torch import nn

from gradaug_hf.experiments.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from gradaug_hf.experiments.evaluation.pixels import PixelNetwork
from gradaug_hf.experiments.evaluation.robustness import (
    CLEAN,
    corruption_condition,
    corruption_errors,
    fgsm,
    fgsm_condition,
    mean_corruption_error,
    mean_error,
    plot_robustness,
    robustness_table,
)
from tests.helpers.pictures import pixels_of_each_grey

EPSILONS = [0.01, 0.1]


@pytest.fixture
def linear() -> PixelNetwork:
    """Two classes, one pixel of three channels: logits are ((1, -2, 0), (0, 1, 0)) of (pixels - 0.5) / 0.25."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.0], [0.0, 1.0, 0.0]]))
        layer.bias.zero_()
    return PixelNetwork(nn.Sequential(nn.Flatten(), layer), (0.5,) * 3, (0.25,) * 3).eval()


def errors_of(clean: float, corrupted: float) -> dict[str, float]:
    conditions = [corruption_condition(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    return {
        CLEAN: clean,
        fgsm_condition(0.01): clean,
        fgsm_condition(0.1): 1.0,
        **dict.fromkeys(conditions, corrupted),
    }


def test_pixels_move_by_epsilon_along_the_sign_of_the_analytic_gradient(linear):
    pixels = torch.tensor([[0.4, 0.6, 0.2], [0.4, 0.6, 0.2]]).view(2, 3, 1, 1)
    # d cross-entropy / d pixel = sum over classes of (p - one hot) * weight / 0.25. Of label 0: (p0 - 1) * (1, -2, 0)
    # + p1 * (0, 1, 0) = p1 * (-1, 3, 0); of label 1: p0 * (1, -3, 0). No probability is zero.
    (moved,) = fgsm(linear, pixels, torch.tensor([0, 1]), [0.05])
    expected = torch.tensor([[0.35, 0.65, 0.2], [0.45, 0.55, 0.2]]).view(2, 3, 1, 1)
    torch.testing.assert_close(moved, expected)


def test_attacked_pixels_are_clipped_to_the_range_of_pixels(linear):
    pixels = torch.tensor([0.01, 0.99, 0.5]).view(1, 3, 1, 1)
    (moved,) = fgsm(linear, pixels, torch.tensor([0]), [0.1])
    torch.testing.assert_close(moved, torch.tensor([0.0, 1.0, 0.5]).view(1, 3, 1, 1))


def test_loss_rises_with_epsilon(linear):
    pixels, labels = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2
    losses = [
        nn.functional.cross_entropy(linear(moved), labels).item()
        for moved in (pixels, *fgsm(linear, pixels, labels, [0.01, 0.05, 0.1]))
    ]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.1


def test_attack_leaves_no_gradient_in_the_parameters_and_no_trace_in_batch_norm():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        list(fgsm(network, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), [0.1]))
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_attack_on_a_network_in_training_mode_is_refused(linear):
    with pytest.raises(ValueError, match="training mode"):
        list(fgsm(linear.train(), torch.rand(1, 3, 1, 1), torch.tensor([0]), [0.1]))


def test_mean_corruption_error_is_that_of_the_paper():
    # Errors of the baseline are 0.5 everywhere. One corruption has errors 0.1 .. 0.5, of sum 1.5 over 2.5: 0.6; the
    # others 0.25, a ratio of 0.5. A mean of ratios: (0.6 + 14 * 0.5) / 15.
    errors = errors_of(0.1, 0.25)
    for severity in SEVERITIES:
        errors[corruption_condition("fog", severity)] = severity / 10
    assert math.isclose(mean_corruption_error(errors, errors_of(0.2, 0.5)), (0.6 + 14 * 0.5) / 15)
    assert math.isclose(corruption_errors(errors)["fog"], 0.3)
    assert math.isclose(mean_error(errors), (0.3 + 14 * 0.25) / 15)


def test_each_corruption_counts_alike_however_hard_it_is():
    hard_for_baseline = errors_of(0.1, 0.1)
    for severity in SEVERITIES:
        hard_for_baseline[corruption_condition("snow", severity)] = 0.8
    # 14 ratios of 2 and one of 0.25; the ratio of the sums would be 15 * 0.2 / (14 * 0.1 + 0.8).
    assert math.isclose(mean_corruption_error(errors_of(0.1, 0.2), hard_for_baseline), (14 * 2 + 0.25) / 15)


def test_a_network_is_as_robust_as_itself():
    errors = errors_of(0.1, 0.3)
    assert math.isclose(mean_corruption_error(errors, errors), 1)


def test_mean_corruption_error_is_undefined_where_the_baseline_makes_no_error():
    assert mean_corruption_error(errors_of(0.1, 0.3), errors_of(0.1, 0.0)) is None


def test_table_shows_networks_side_by_side():
    errors = {"plain": errors_of(0.1, 0.5), "gradaug": errors_of(0.05, 0.4)}
    lines = robustness_table(errors, EPSILONS, corruptions=True, baseline="plain").splitlines()
    assert lines[:5] == [
        "| top-1 error %           |  plain | gradaug |",
        "|-------------------------|-------:|--------:|",
        "| no corruption           |  10.00 |    5.00 |",
        "| FGSM 0.01               |  10.00 |    5.00 |",
        "| FGSM 0.1                | 100.00 |  100.00 |",
    ]
    assert lines[5] == "| gaussian noise          |  50.00 |   40.00 |"
    assert lines[-2:] == [
        "| mean of the corruptions |  50.00 |   40.00 |",
        "| mCE, plain = 100        | 100.00 |   80.00 |",
    ]
    assert len(lines) == 2 + 3 + 15 + 2


def test_table_without_baseline_has_the_unnormalised_mean_alone():
    table = robustness_table({"net": errors_of(0.1, 0.5)}, EPSILONS, corruptions=True, baseline=None)
    assert "mean of the corruptions" in table
    assert "mCE" not in table
    assert "corruptions" not in robustness_table({"net": errors_of(0.1, 0.5)}, EPSILONS, False, None)


@pytest.mark.parametrize("corruptions", [True, False])
def test_plot_needs_no_colour(tmp_path, corruptions: bool):
    errors = {name: errors_of(0.1 * index, 0.2 * index) for index, name in enumerate("ab", start=1)}
    plot_robustness(errors, EPSILONS, corruptions, tmp_path / "plot.png", "two networks")
    strokes = pixels_of_each_grey(tmp_path / "plot.png")
    assert min(strokes[0], strokes[153]) > 200
