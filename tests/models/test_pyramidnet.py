import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaug_hf import at_width, extract_subnet, make_slimmable, slicing_report
from gradaug_hf.models import PyramidNet
from tests.helpers.oracle import kept_entries, randomised, relative_error, zeroed


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("pyramidnet200_a240", 100, 26_844_952),
        ("pyramidnet200_a240", 10, 26_752_702),
        ("pyramidnet110_a48", 10, 1_772_706),
    ],
)
def test_parameter_count_is_the_published_one(name: str, num_classes: int, parameters: int):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=num_classes)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.fixture(params=[True, False], ids=["bottleneck", "basic"])
def network(request: pytest.FixtureRequest) -> PyramidNet:
    """Two blocks a stage whose channels grow from 16 by 6.5 each: 22 (22.5), 29, 36 (35.5), 42, 48 (48.5), 55."""
    torch.manual_seed(0)
    return PyramidNet(depth=20 if request.param else 14, alpha=39, bottleneck=request.param, num_classes=5)


def blocks_of(network: PyramidNet) -> list[nn.Module]:
    return [*network.layer1, *network.layer2, *network.layer3]


def test_channels_grow_by_the_same_amount_from_block_to_block(network: PyramidNet):
    assert [block.conv2.out_channels for block in blocks_of(network)] == [22, 29, 36, 42, 48, 55]
    assert network.num_features == 55 * blocks_of(network)[0].expansion


def reference_logits(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """Han et al., figure 6 (d): batch norm with stored statistics, no ReLU before the first convolution."""

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = state[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    x = norm("bn1", conv("conv1", x))
    for stage in (1, 2, 3):
        for index in range(blocks):
            name = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            if f"{name}.conv3.weight" in state:
                y = conv(f"{name}.conv1", norm(f"{name}.bn1", x))
                y = conv(f"{name}.conv2", norm(f"{name}.bn2", y).clamp(min=0), stride)
                y = norm(f"{name}.bn4", conv(f"{name}.conv3", norm(f"{name}.bn3", y).clamp(min=0)))
            else:
                y = conv(f"{name}.conv1", norm(f"{name}.bn1", x), stride)
                y = norm(f"{name}.bn3", conv(f"{name}.conv2", norm(f"{name}.bn2", y).clamp(min=0)))
            if stride == 2:
                x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
            y[:, : x.shape[1]] += x
            x = y
    return norm("bn", x).clamp(min=0).mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@torch.no_grad()
def test_logits_are_those_of_the_published_layout(network: PyramidNet):
    network = randomised(network, torch.randn(8, 3, 16, 16)).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(x), reference_logits(network.state_dict(), x, blocks=2), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_dropped_block_gives_its_pooled_input_and_zeros_for_new_channels():
    torch.manual_seed(0)
    network = PyramidNet(depth=14, alpha=39, bottleneck=False, drop_path_rate=0.5)
    block = network.layer2[0]
    block.drop_path.drop_prob = 1.0
    nn.init.normal_(block.bn3.bias)
    x = torch.randn(2, 29, 8, 8)
    out = block(x)
    assert torch.allclose(out[:, :29], F.avg_pool2d(x, 2))
    assert out.shape == (2, 36, 4, 4)
    assert not out[:, 29:].any()


def test_every_channel_is_sliced_and_rounded_for_itself(network: PyramidNet):
    report = slicing_report(make_slimmable(network, input_size=16))
    assert report.sliced_macs == 1
    assert not report.refused
    subnet = extract_subnet(network, 0.75)
    expansion = network.layer1[0].expansion
    for block, channels in zip(blocks_of(subnet), [22, 29, 36, 42, 48, 55], strict=True):
        last = block.conv3 if expansion == 4 else block.conv2
        assert block.conv2.out_channels == int(0.75 * channels + 0.5)
        assert last.out_channels == int(0.75 * expansion * channels + 0.5)


@pytest.mark.parametrize("width", [0.5, 0.8, 0.93])
@torch.no_grad()
def test_subnet_equals_the_full_network_with_left_out_channels_zeroed(network: PyramidNet, width: float):
    untouched = randomised(network, torch.randn(8, 3, 16, 16))
    model = make_slimmable(copy.deepcopy(untouched).double(), input_size=16)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with at_width(model, width):
        output = model(x)
    assert relative_error(output, zeroed(untouched, kept_entries(model, width))(x)) < 1e-10
    assert relative_error(output, model(x)) > 1e-3


def test_drop_layers_leave_every_channel_sliced_and_gradients_equal_under_checkpointing():
    rates = {"drop_path_rate": 0.4, "drop_block_rate": 0.2, "shake_drop_rate": 0.9}
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        network = PyramidNet(depth=20, alpha=39, bottleneck=True, num_classes=5, **rates)
        make_slimmable(network, input_size=16)
        assert slicing_report(network).sliced_macs == 1
        network.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        with at_width(network, 0.8):
            network(torch.randn(4, 3, 16, 16)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(("depth", "bottleneck"), [(2, False), (15, False), (14, True)])
def test_a_depth_that_no_three_equal_stages_have_is_refused(depth: int, bottleneck: bool):
    with pytest.raises(ValueError, match=f"depth={depth}: .* with bottleneck={bottleneck} has [69] n"):
        PyramidNet(depth, alpha=48, bottleneck=bottleneck)


def test_a_network_that_narrows_is_refused():
    with pytest.raises(ValueError, match="alpha=-1"):
        PyramidNet(depth=14, alpha=-1, bottleneck=False)


def test_a_shakedrop_rate_that_is_no_probability_below_one_is_refused():
    with pytest.raises(ValueError, match=r"shake_drop_rate is 1; a drop rate lies in \[0, 1\)"):
        timm.create_model("pyramidnet110_a48", shake_drop_rate=1)
