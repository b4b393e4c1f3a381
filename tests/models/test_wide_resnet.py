import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from gradaug_hf import make_slimmable, slicing_report
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


@pytest.mark.parametrize("size", [8, 9, 24, 28, 32, (16, 40)])
def test_any_image_of_eight_pixels_and_more_is_accepted(network: WideResNet, size: int | tuple[int, int]):
    height, width = (size, size) if isinstance(size, int) else size
    assert network(torch.randn(2, 3, height, width)).shape == (2, 5)


def test_convolutions_are_initialised_by_fan_out():
    torch.manual_seed(0)
    network = timm.create_model("wrn16_4")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            expected = (2 / fan_out) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
    assert not network.fc.bias.any()


def test_pretrained_cfg_carries_cifar(network: WideResNet):
    config = resolve_model_data_config(network)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == pytest.approx((125.3 / 255, 123.0 / 255, 113.9 / 255))
    assert config["std"] == pytest.approx((63.0 / 255, 62.1 / 255, 66.7 / 255))
    assert config["crop_pct"] == 1.0


def test_image_channels_and_pooling_can_be_changed():
    network = timm.create_model("wrn16_2", num_classes=5, in_chans=1, global_pool="catavgmax")
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert network.head_hidden_size == 256


def test_features_and_head_make_up_the_forward(network: WideResNet):
    network.eval()
    x = torch.randn(2, 3, 32, 32)
    features = network.forward_features(x)
    assert features.shape == (2, network.num_features, 8, 8)
    assert network.forward_head(features, pre_logits=True).shape == (2, network.head_hidden_size)
    assert torch.equal(network.forward_head(features), network(x))


def test_classifier_can_be_replaced(network: WideResNet):
    features = network.forward_features(torch.randn(2, 3, 32, 32))
    network.reset_classifier(7, "max")
    assert network.get_classifier() is network.fc
    assert network.num_classes == 7
    pooled = features.amax((2, 3))
    torch.testing.assert_close(network.forward_head(features), pooled @ network.fc.weight.T + network.fc.bias)
    network.reset_classifier(0)
    torch.testing.assert_close(network.forward_head(features), pooled)


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


def test_gradient_checkpointing_leaves_the_gradients_unchanged(network: WideResNet):
    x = torch.randn(4, 3, 16, 16)
    network(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    network.set_grad_checkpointing()
    network(x).square().sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_depth_other_than_six_n_plus_four_is_refused():
    with pytest.raises(ValueError, match="depth=20"):
        WideResNet(depth=20, widen_factor=2)


def test_saved_folder_loads_as_a_local_timm_model(network: WideResNet, tmp_path):
    network.eval()
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), network(x))


def test_all_channels_but_image_and_classes_are_sliced(network: WideResNet):
    report = slicing_report(make_slimmable(network))
    assert report.sliced_macs == 1
    assert not report.refused
    whole = network.fc.bias.numel()
    assert report.sliced_params == 1 - whole / report.params()
