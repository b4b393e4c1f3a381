"""Residual networks for CIFAR in timm's registry (He et al., 2015, arXiv 1512.03385, section 4.2)."""

from typing import Any

from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from gradaug_hf.models.cifar import CifarNetwork, cifar_cfg


class BasicBlock(nn.Module):
    """3x3 convolution and batch norm, twice, beside a shortcut, with ReLU in between and behind the sum.

    Where number of channels or stride changes, the shortcut is a 1x1 convolution and batch norm.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, drop_block: nn.Module, drop_path: nn.Module, **dd: Any
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(out_channels, **dd)
        self.drop_block = drop_block
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_channels, **dd)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **dd), nn.BatchNorm2d(out_channels, **dd)
            )
        self.drop_path = drop_path
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        residual = self.drop_path(self.bn2(self.conv2(residual)))
        return self.act2(residual + (x if self.downsample is None else self.downsample(x)))


class CifarResNet(CifarNetwork):
    """Residual network of three stages with 16, 32 and 64 channels.

    Any image of at least 8x8 pixels is accepted: the features are pooled adaptively.

    Args:
        depth: Number of layers, 6 n + 2 for n blocks in each stage.
        settings: Of CifarNetwork, from `num_classes` on.

    Raises:
        ValueError: `depth` is not 6 n + 2, or a rate is not in [0, 1).
    """

    def __init__(self, depth: int, **settings: Any):
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth={depth}: a residual network for CIFAR has 6 n + 2 layers (8, 14, 20, 26, ...)")
        super().__init__(BasicBlock, [[width] * blocks for width in (16, 32, 64)], **settings)
        self.bn1 = nn.BatchNorm2d(self.STEM_CHANNELS, **get_device_dtype(self))
        self.act1 = nn.ReLU(inplace=True)


default_cfgs = generate_default_cfgs(
    dict.fromkeys(("resnet110_cifar", "resnet56_cifar", "resnet20_cifar"), cifar_cfg(paper_ids="arXiv:1512.03385"))
)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-110: 1,736,564 parameters with 100 classes."""
    return build_model_with_cfg(CifarResNet, "resnet110_cifar", pretrained, depth=110, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-56: 861,620 parameters with 100 classes."""
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, depth=56, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-20: 278,324 parameters with 100 classes."""
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, depth=20, **kwargs)
