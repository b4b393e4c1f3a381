import pytest
import timm
import torch
from torch import Tensor, nn

from gradaug_hf.models.shake_drop import ShakeDrop, add_shake_drop


def factors(layer: nn.Module, count: int, images: int = 4) -> list[tuple[Tensor, Tensor]]:
    """By what each of `count` batches and its gradient is multiplied, one number for each image."""
    seen = []
    for _ in range(count):
        x = torch.rand(images, 2, 3, 3, dtype=torch.float64).add(1).requires_grad_()
        upstream = torch.rand_like(x) + 1
        out = layer(x)
        out.backward(upstream)
        forward, backward = out.detach() / x.detach(), x.grad / upstream
        for factor in (forward, backward):
            assert torch.allclose(factor, factor[:, :1, :1, :1].expand_as(factor)), "one number for each image"
        seen.append((forward[:, 0, 0, 0], backward[:, 0, 0, 0]))
    return seen


def test_a_scaled_residual_is_multiplied_by_alpha_and_its_gradient_by_an_independent_beta():
    torch.manual_seed(0)
    (alpha, beta) = (torch.cat(numbers) for numbers in zip(*factors(ShakeDrop(0.999), 1000), strict=True))
    scaled = alpha != 1
    alpha, beta = alpha[scaled], beta[scaled]
    assert -1 <= alpha.min() < -0.99 and 0.99 < alpha.max() <= 1
    assert 0 <= beta.min() < 0.01 and 0.99 < beta.max() <= 1
    # Mean and variance of uniform numbers from [-1, 1] and [0, 1].
    assert alpha.mean().item() == pytest.approx(0, abs=0.04)
    assert alpha.var().item() == pytest.approx(1 / 3, abs=0.02)
    assert beta.mean().item() == pytest.approx(1 / 2, abs=0.02)
    assert beta.var().item() == pytest.approx(1 / 12, abs=0.005)
    correlations = torch.corrcoef(torch.stack([beta, alpha, alpha.abs()]))[0, 1:]
    assert correlations.abs().max() < 0.06


def test_a_batch_is_scaled_with_the_probability_of_the_rate_or_left_as_it_is():
    torch.manual_seed(0)
    batches = factors(ShakeDrop(0.3), 1000)
    unscaled = [bool((forward == 1).all()) for forward, _ in batches]
    assert sum(unscaled) / len(batches) == pytest.approx(0.7, abs=0.04)
    for (forward, backward), left in zip(batches, unscaled, strict=True):
        assert bool((backward == 1).all()) == left
        assert left or (forward != 1).all()


def test_evaluation_multiplies_by_what_is_expected_while_training():
    torch.manual_seed(0)
    layer = ShakeDrop(0.4)
    trained = torch.cat([forward for forward, _ in factors(layer, 1500)]).mean().item()
    ((forward, backward),) = factors(layer.eval(), 1)
    assert torch.allclose(forward, torch.tensor(0.6, dtype=torch.float64))
    assert torch.allclose(backward, torch.tensor(0.6, dtype=torch.float64))
    assert trained == pytest.approx(0.6, abs=0.05)


def test_scaled_by_keep_training_is_divided_by_what_is_expected_and_evaluation_changes_nothing():
    torch.manual_seed(0)
    plain = factors(ShakeDrop(0.4), 20)
    torch.manual_seed(0)
    kept = factors(ShakeDrop(0.4, scale_by_keep=True), 20)
    for (forward, backward), (expected_forward, expected_backward) in zip(kept, plain, strict=True):
        assert torch.allclose(forward, expected_forward / 0.6)
        assert torch.allclose(backward, expected_backward / 0.6)
    ((forward, backward),) = factors(ShakeDrop(0.4, scale_by_keep=True).eval(), 1)
    assert (forward == 1).all() and (backward == 1).all()


def test_shaken_network_of_timm_is_the_network_itself_when_it_is_evaluated():
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=3, zero_init_last=False).eval()
    images = torch.randn(2, 3, 64, 64)
    expected, keys = network(images), list(network.state_dict())
    add_shake_drop(network, 0.5)
    assert torch.equal(network(images), expected)
    assert list(network.state_dict()) == keys
    rates = [module.rate for module in network.modules() if isinstance(module, ShakeDrop)]
    assert rates == [0.5 * number / 8 for number in range(1, 9)]
    network.train()
    assert not torch.equal(network(images), network(images))


def test_network_without_residual_blocks_cannot_be_shaken():
    with pytest.raises(ValueError, match="VGG has no residual block with a drop_path"):
        add_shake_drop(timm.create_model("vgg11", num_classes=2), 0.5)


def test_a_rate_of_zero_changes_nothing():
    ((forward, backward),) = factors(ShakeDrop(0.0), 1)
    assert (forward == 1).all() and (backward == 1).all()


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5])
def test_a_rate_that_is_no_probability_below_one_is_refused(rate: float):
    with pytest.raises(ValueError, match=f"rate is {rate}"):
        ShakeDrop(rate)
