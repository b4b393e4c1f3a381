"""timm's tiny networks and a dozen small families, each with operations of its own, sliced and proven.

`pytest -m slow tests/slimming/test_zoo.py` takes the smallest network of every timm module instead.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

import gradaug_hf
from gradaug_hf.objective.resolutions import ResolutionTrial
from tests.helpers.oracle import kept_entries, randomised, relative_error, zeroed
from tests.helpers.outside import Outside

SMALL = [
    "crossvit_tiny_240",
    "edgenext_xx_small",
    "efficientvit_b0",
    "fasternet_t0",
    "ghostnet_050",
    "lcnetv2_small",
    "mobilevit_xxs",
    "pit_ti_224",
    "repghostnet_050",
    "shvit_s1",
    "starnet_s050",
    "vit_tiny_patch16_224",
]
# These compute their attention or their norms in float32 whatever the images are.
IN_FLOAT32 = ("efficientvit_b", "deepseek_vit")
# Of networks of hundreds of millions of parameters, some of the equal blocks.
SHORTER = {"deepseek_vit_412m": {"depth": 4}, "gemma4_vit_167m": {"depth": 4}}
SMALLEST = json.loads((Path(__file__).parent / "smallest.json").read_text())


WIDTHS = (0.5, 0.75, 0.9)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    process = Outside(tmp_path_factory.mktemp("outside"))
    yield process
    process.close()


def check(name: str, outside: Outside) -> None:
    """All promises about slicing, on one network of timm."""
    torch.manual_seed(0)
    untouched = timm.create_model(name, num_classes=10, **SHORTER.get(name, {}))
    images = small_images(untouched)
    untouched = randomised(untouched, images)
    model = copy.deepcopy(untouched)
    before = state_of(model)
    gradaug_hf.make_slimmable(model)
    assert state_of(model) == before
    assert gradaug_hf.slicing_report(model).sliced_macs > 0
    with torch.no_grad():
        assert torch.equal(model(images), untouched(images))
    for width in WIDTHS:
        check_backward(model, width, images)
    tolerance = 1e-5 if name.startswith(IN_FLOAT32) else 1e-9
    model = model.eval().double()
    for width in WIDTHS:
        check_outputs(model, untouched, width, images[:1].double(), tolerance, outside)


def small_images(model: torch.nn.Module) -> torch.Tensor:
    """Two images of the smallest of a few sides that the network takes."""
    channels, _, native = model.pretrained_cfg["input_size"]
    side = ResolutionTrial(model).accepted([64, 96, 128, native])[0]
    return torch.randn(2, channels, side, side)


def state_of(model: torch.nn.Module) -> dict[str, int]:
    return {key: tensor.data_ptr() for key, tensor in model.state_dict(keep_vars=True).items()}


def check_backward(model: torch.nn.Module, width: float, images: torch.Tensor) -> None:
    with gradaug_hf.at_width(model.train(), width):
        model(images).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients), width
    model.zero_grad()


@torch.no_grad()
def check_outputs(
    model: torch.nn.Module,
    untouched: torch.nn.Module,
    width: float,
    images: torch.Tensor,
    tolerance: float,
    outside: Outside,
) -> None:
    reference = zeroed(untouched, kept_entries(model, width))
    expected = reference(images)
    # Some networks amplify what rounding does to their input by 1e8: halonet_h1, whose attention saturates.
    tolerance = max(tolerance, relative_error(reference(images * (1 + 4 * torch.finfo(images.dtype).eps)), expected))
    with gradaug_hf.at_width(model, width):
        output = model(images)
    assert relative_error(output, expected) < tolerance, width
    dense = gradaug_hf.extract_subnet(model, width)
    assert relative_error(outside.run(dense, images), output) < tolerance, width


@pytest.mark.parametrize("name", [*timm.list_models("test_*"), *SMALL])
def test_a_small_network_equals_its_zeroed_self_at_every_width(name, outside):
    check(name, outside)


@pytest.mark.slow
@pytest.mark.parametrize("module", SMALLEST)
def test_the_smallest_network_of_every_timm_module_equals_its_zeroed_self(module, outside):
    check(SMALLEST[module], outside)
