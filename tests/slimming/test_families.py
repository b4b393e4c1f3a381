"""Every family of convolutional networks, smallest member: slicing through the whole depth, and correct."""

import copy

import pytest
import timm
import torch

import gradaug_hf
from tests.helpers.oracle import kept_entries, randomised, relative_error, zeroed

FAMILIES = [
    "resnet18",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "seresnet18",
    "resnet18d",
    "vgg11_bn",
    "mobilenetv2_035",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "regnetx_002",
    "regnety_002",
    "wrn16_2",
]
# VGG's first fully connected layer alone has 100 million parameters, a wide bottleneck network 66 million.
SMALLER = {"vgg11_bn": {"mlp_ratio": 0.125}, "wide_resnet50_2": {"layers": (1, 1, 2, 1)}}
WIDTHS = [0.5, 0.75, 0.9]
SIDE = 32


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES, scope="module")
def networks(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module]:
    """An untouched network and its slimmable copy, with random statistics."""
    torch.manual_seed(0)
    untouched = timm.create_model(request.param, num_classes=10, **SMALLER.get(request.param, {}))
    untouched = randomised(untouched, images(8))
    return untouched, gradaug_hf.make_slimmable(copy.deepcopy(untouched))


def test_nearly_all_multiply_adds_are_sliced(networks):
    report = gradaug_hf.slicing_report(networks[1])
    assert report.sliced_macs > 0.9
    assert report.sliced_params > 0.9
    assert not report.refused


@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_backward_run_and_reach_every_parameter(networks, width):
    model = copy.deepcopy(networks[1]).train()
    with gradaug_hf.at_width(model, width):
        model(images(4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("width", WIDTHS)
def test_subnet_equals_the_full_network_with_left_out_channels_zeroed(networks, width):
    untouched, model = networks
    x = images(2).double()
    with torch.no_grad():
        expected = zeroed(untouched, kept_entries(model, width))(x)
        model = copy.deepcopy(model).double()
        with gradaug_hf.at_width(model, width):
            output = model(x)
        dense = gradaug_hf.extract_subnet(model, width)(x)
        full = model(x)
    assert relative_error(output, expected) < 1e-10
    assert relative_error(dense, output) < 1e-10
    assert relative_error(expected[:1], expected[1:]) > 1e-3, "the images must make a difference to the check"
    assert relative_error(output, full) > 1e-3


def test_full_width_is_bit_identical_to_the_untouched_network(networks):
    untouched, model = (copy.deepcopy(network) for network in networks)
    x = images(4)
    assert torch.equal(model(x), untouched(x))
    torch.manual_seed(0)
    trained = model.train()(x)
    torch.manual_seed(0)
    assert torch.equal(trained, untouched.train()(x))
    for (name, buffer), (_, expected) in zip(model.named_buffers(), untouched.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
