"""timm's tiny networks and a dozen small families, each with operations of its own, sliced and proven.

`pytest -m slow tests/slimming/test_zoo.py` takes the smallest network of every timm module instead.
"""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch

import gradaug_hf
from tests.slimming.oracle import kept_entries, randomised, relative_error, zeroed

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
# These compute their attention in float32 whatever the images are.
IN_FLOAT32 = ("efficientvit_b",)
SMALLEST = json.loads((Path(__file__).parent / "smallest.json").read_text())


def check(name: str) -> None:
    torch.manual_seed(0)
    untouched = timm.create_model(name, num_classes=10)
    size = untouched.pretrained_cfg["input_size"]
    images = torch.randn(2, *size)
    untouched = randomised(untouched, images)
    model = copy.deepcopy(untouched)
    state = {key: tensor.data_ptr() for key, tensor in model.state_dict(keep_vars=True).items()}
    gradaug_hf.make_slimmable(model)
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict(keep_vars=True).items()} == state
    assert gradaug_hf.slicing_report(model).sliced_macs > 0
    with torch.no_grad():
        assert torch.equal(model(images), untouched(images))
    images = images[:1].double()
    model = model.double()
    for width in (0.5, 0.75, 0.9):
        with torch.no_grad():
            expected = zeroed(untouched, kept_entries(model, width))(images)
            with gradaug_hf.at_width(model, width):
                output = model(images)
            dense = gradaug_hf.extract_subnet(model, width)(images)
        tolerance = 1e-5 if name.startswith(IN_FLOAT32) else 1e-9
        assert relative_error(output, expected) < tolerance, width
        assert relative_error(dense, output) < tolerance, width
    with gradaug_hf.at_width(model.train(), 0.75):
        model(torch.cat([images, -images])).square().sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", [*timm.list_models("test_*"), *SMALL])
def test_a_small_network_equals_its_zeroed_self_at_every_width(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("module", SMALLEST)
def test_the_smallest_network_of_every_timm_module_equals_its_zeroed_self(module):
    check(SMALLEST[module])
