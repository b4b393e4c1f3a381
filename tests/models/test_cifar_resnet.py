import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradaug_hf.models import CifarResNet


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("resnet110_cifar", 100, 1_736_564),
        ("resnet110_cifar", 10, 1_730_714),
        ("resnet56_cifar", 100, 861_620),
        ("resnet20_cifar", 100, 278_324),
    ],
)
def test_parameter_count_is_the_published_one(name: str, num_classes: int, parameters: int):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=num_classes)
    assert sum(p.numel() for p in network.parameters()) == parameters


def reference_logits(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """He et al., section 4.2, with 1x1 convolutions as shortcuts; batch norm with stored statistics."""

    def conv(conv_name: str, norm_name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = state[f"{conv_name}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        weight, bias, mean, var = (
            state[f"{norm_name}.{key}"].view(1, -1, 1, 1) for key in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = conv("conv1", "bn1", x).clamp(min=0)
    for stage in (1, 2, 3):
        for index in range(blocks):
            name = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            residual = conv(f"{name}.conv1", f"{name}.bn1", x, stride).clamp(min=0)
            residual = conv(f"{name}.conv2", f"{name}.bn2", residual)
            if stride == 2:
                x = conv(f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
            x = (x + residual).clamp(min=0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def test_logits_are_those_of_the_published_layout():
    torch.manual_seed(0)
    network = timm.create_model("resnet20_cifar", num_classes=5).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(x), reference_logits(network.state_dict(), x, blocks=3), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_depth_other_than_six_n_plus_two_is_refused(depth: int):
    with pytest.raises(ValueError, match=f"depth={depth}"):
        CifarResNet(depth)


@torch.no_grad()
def test_a_dropped_block_gives_the_activated_shortcut():
    torch.manual_seed(0)
    network = timm.create_model("resnet20_cifar", drop_path_rate=0.5)
    same, narrowing = network.layer3[1], network.layer3[0]
    for block in (same, narrowing):
        block.drop_path.drop_prob = 1.0
        nn.init.normal_(block.bn2.bias)
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(same(x), x.clamp(min=0))
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(narrowing(x), narrowing.downsample(x).clamp(min=0))
