"""Pyramidal residual networks for CIFAR in timm's registry (Han, Kim and Kim, 2017, arXiv 1610.02915)."""

from typing import Any

import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from gradaug_hf.models.cifar import CifarNetwork, cifar_cfg


class PyramidBlock(nn.Module):
    """Residual that begins and ends with a batch norm, beside a shortcut with zeros for the channels it lacks.

    With a stride the shortcut is pooled by averaging. A subclass defines `residual`.

    Args:
        stride: Stride of the residual.
        drop_block: Applied behind the last norm but one of the residual.
        drop_path: Applied to the residual.
    """

    expansion = 1

    def __init__(self, stride: int, drop_block: nn.Module, drop_path: nn.Module):
        super().__init__()
        self.drop_block = drop_block
        self.drop_path = drop_path
        self.downsample = None if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)

    def residual(self, x: Tensor) -> Tensor:
        """Return the residual (N, out_channels, H/stride, W/stride) of an input (N, in_channels, H, W)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        residual = self.drop_path(self.residual(x))
        shortcut = x if self.downsample is None else self.downsample(x)
        # Both have the channels of the current width only.
        return residual + F.pad(shortcut, (0, 0, 0, 0, 0, residual.size(1) - shortcut.size(1)))


class PyramidBasicBlock(PyramidBlock):
    """Two 3x3 convolutions."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, drop_block: nn.Module, drop_path: nn.Module, **dd: Any
    ):
        super().__init__(stride, drop_block, drop_path)
        self.bn1 = nn.BatchNorm2d(in_channels, **dd)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_channels, **dd)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(out_channels, **dd)

    def residual(self, x: Tensor) -> Tensor:
        x = self.conv1(self.bn1(x))
        return self.bn3(self.conv2(self.act(self.drop_block(self.bn2(x)))))


class PyramidBottleneck(PyramidBlock):
    """1x1 convolution to a quarter of the channels, 3x3 convolution, 1x1 convolution."""

    expansion = 4

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, drop_block: nn.Module, drop_path: nn.Module, **dd: Any
    ):
        super().__init__(stride, drop_block, drop_path)
        inner = out_channels // self.expansion
        self.bn1 = nn.BatchNorm2d(in_channels, **dd)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(inner, **dd)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(inner, **dd)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False, **dd)
        self.bn4 = nn.BatchNorm2d(out_channels, **dd)

    def residual(self, x: Tensor) -> Tensor:
        x = self.act(self.bn2(self.conv1(self.bn1(x))))
        x = self.act(self.drop_block(self.bn3(self.conv2(x))))
        return self.bn4(self.conv3(x))


class PyramidNet(CifarNetwork):
    """Residual network of three stages whose number of channels grows by the same amount in each block.

    Any image of at least 8x8 pixels is accepted: the features are pooled adaptively.

    Args:
        depth: Number of layers, 6 n + 2 (with bottlenecks 9 n + 2) for n blocks in each stage.
        alpha: By how many channels (with bottlenecks, inner ones) the last block is wider than the first convolution.
        bottleneck: Whether the blocks are bottlenecks, whose output has four times as many channels.
        settings: Of CifarNetwork, from `num_classes` on.

    Raises:
        ValueError: no model has such a `depth` or `alpha`, or a rate is not in [0, 1).
    """

    def __init__(self, depth: int, alpha: int, bottleneck: bool, **settings: Any):
        block = PyramidBottleneck if bottleneck else PyramidBasicBlock
        layers = 9 if bottleneck else 6
        blocks, remainder = divmod(depth - 2, layers)
        if remainder or blocks < 1:
            raise ValueError(
                f"depth={depth}: a pyramidal network with bottleneck={bottleneck} has {layers} n + 2 layers"
            )
        if alpha < 0:
            raise ValueError(f"alpha={alpha}: a pyramidal network widens by 0 channels or more")
        total = 3 * blocks
        channels = [round(self.STEM_CHANNELS + alpha * i / total) * block.expansion for i in range(1, total + 1)]
        super().__init__(block, [channels[start : start + blocks] for start in range(0, total, blocks)], **settings)
        self.bn1 = nn.BatchNorm2d(self.STEM_CHANNELS, **get_device_dtype(self))
        self.bn = nn.BatchNorm2d(self.num_features, **get_device_dtype(self))
        self.act = nn.ReLU(inplace=True)


default_cfgs = generate_default_cfgs(
    dict.fromkeys(("pyramidnet200_a240", "pyramidnet110_a48"), cifar_cfg(paper_ids="arXiv:1610.02915"))
)


@register_model
def pyramidnet200_a240(pretrained: bool = False, **kwargs) -> PyramidNet:
    """PyramidNet-200 with bottlenecks, alpha 240: 26,844,952 parameters with 100 classes."""
    return build_model_with_cfg(
        PyramidNet, "pyramidnet200_a240", pretrained, depth=200, alpha=240, bottleneck=True, **kwargs
    )


@register_model
def pyramidnet110_a48(pretrained: bool = False, **kwargs) -> PyramidNet:
    """PyramidNet-110, alpha 48: 1,772,706 parameters with 10 classes."""
    return build_model_with_cfg(
        PyramidNet, "pyramidnet110_a48", pretrained, depth=110, alpha=48, bottleneck=False, **kwargs
    )
