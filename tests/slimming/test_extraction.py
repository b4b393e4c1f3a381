import copy
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import gradaug_hf


@pytest.fixture(scope="module")
def slimmable() -> nn.Module:
    torch.manual_seed(0)
    return gradaug_hf.make_slimmable(timm.create_model("mobilenetv2_035", num_classes=10)).eval()


@pytest.fixture
def model(slimmable: nn.Module) -> nn.Module:
    return copy.deepcopy(slimmable)


def test_a_subnet_is_dense_narrower_and_independent(model):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), gradaug_hf.at_width(model, 0.75):
        expected = model(x)
    subnet = gradaug_hf.extract_subnet(model, 0.75)
    report = gradaug_hf.slicing_report(model)
    assert sum(p.numel() for p in subnet.parameters()) == report.params(0.75) < report.params()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.allclose(subnet(x), expected, atol=1e-5)


def test_sizes_of_layers_say_what_they_hold(model):
    for name, module in gradaug_hf.extract_subnet(model, 0.5).named_modules():
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
            assert module.weight.shape == shape, name
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean), name


def test_a_subnet_runs_where_gradaug_hf_cannot_be_imported(model, tmp_path):
    x = torch.randn(2, 3, 32, 32)
    subnet = gradaug_hf.extract_subnet(model, 0.75)
    torch.save({"subnet": subnet, "x": x, "y": subnet(x).detach()}, tmp_path / "subnet.pt")
    code = (
        "import sys; sys.modules['gradaug_hf'] = None\n"
        "import torch; saved = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(saved['subnet'](saved['x']), saved['y'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "subnet.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_full_width_gives_an_equal_network(model):
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(gradaug_hf.extract_subnet(model, 1.0)(x), model(x))


def test_frozen_parameters_stay_frozen(model):
    model.conv_stem.weight.requires_grad_(False)
    subnet = gradaug_hf.extract_subnet(model, 0.5)
    assert not subnet.conv_stem.weight.requires_grad
    assert subnet.classifier.weight.requires_grad
