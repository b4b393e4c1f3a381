import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaug_hf.models.wide_resnet import WideResNet


@pytest.fixture
def network() -> WideResNet:
    torch.manual_seed(0)
    return timm.create_model("wrn16_2", num_classes=5)


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("wrn28_10", 100, 36_536_884),
        ("wrn28_10", 10, 36_479_194),
        ("wrn28_2", 10, 1_467_610),
        ("wrn16_4", 10, 2_748_890),
        ("wrn16_2", 10, 691_674),
        ("wrn10_2", 10, 303_706),
    ],
)
def test_parameter_count_is_the_published_one(name: str, num_classes: int, parameters: int):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=num_classes)
    assert sum(p.numel() for p in network.parameters()) == parameters


def reference_logits(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """Zagoruyko and Komodakis, figure 1 (d): batch norm with stored statistics, ReLU, convolution, twice."""

    def activated(name: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("weight", "bias", "running_mean", "running_var")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for index in range(blocks):
            name = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            a = activated(f"{name}.bn1", x)
            if f"{name}.shortcut.weight" in state:
                x = F.conv2d(a, state[f"{name}.shortcut.weight"], stride=stride)
            residual = F.conv2d(a, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            residual = F.conv2d(activated(f"{name}.bn2", residual), state[f"{name}.conv2.weight"], padding=1)
            x = x + residual
    return activated("bn", x).mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def test_logits_are_those_of_the_published_layout(network: WideResNet):
    network = network.double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(x), reference_logits(network.state_dict(), x, blocks=2), rtol=1e-10, atol=1e-10)


def test_the_classifier_starts_without_bias(network: WideResNet):
    assert not network.fc.bias.any()


def test_a_dropped_block_gives_its_shortcut():
    torch.manual_seed(0)
    network = timm.create_model("wrn16_2", drop_path_rate=0.5)
    block = network.layer3[1]
    block.drop_path.drop_prob = 1.0
    x = torch.randn(2, 128, 8, 8)
    assert torch.equal(block(x), x)


def test_dropout_acts_between_the_convolutions_of_a_block_while_training():
    torch.manual_seed(0)
    network = timm.create_model("wrn16_2", drop_rate=0.5)
    x = torch.randn(2, 3, 32, 32)
    seen = []
    network.layer2[1].conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.layer2[1].drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    network(x)
    before, after = seen
    kept = after != 0
    assert torch.equal(after[kept], before[kept] * 2)
    assert kept.sum() / (before != 0).sum() == pytest.approx(0.5, abs=0.05)
    network.eval()
    assert torch.equal(network(x), network(x))


def test_depth_other_than_six_n_plus_four_is_refused():
    with pytest.raises(ValueError, match="depth=20"):
        WideResNet(depth=20, widen_factor=2)
