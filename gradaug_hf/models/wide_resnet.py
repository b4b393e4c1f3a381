"""Wide residual networks for small images in timm's registry (Zagoruyko and Komodakis, 2016, arXiv 1605.07146)."""

from functools import partial
from typing import Any

from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from gradaug_hf.models.cifar import CifarNetwork, cifar_cfg


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice, beside a shortcut.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        drop_rate: float,
        drop_block: nn.Module,
        drop_path: nn.Module,
        **dd: Any,
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_channels, **dd)
        self.drop_block = drop_block
        self.act2 = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False, **dd)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **dd)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        residual = self.act2(self.drop_block(self.bn2(self.conv1(activated))))
        residual = self.drop_path(self.conv2(self.drop(residual)))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(CifarNetwork):
    """Pre-activation residual network of three stages, `widen_factor` times as wide as a thin one.

    Any image of at least 8x8 pixels is accepted: the features are pooled adaptively.

    Args:
        depth: Number of layers, 6 n + 4 for n blocks in each stage.
        widen_factor: The stages have 16, 32 and 64 times this many channels.
        drop_rate: Dropout probability between the two convolutions of each block.
        settings: Of CifarNetwork, from `num_classes` on.

    Raises:
        ValueError: `depth` is not 6 n + 4, or a rate is not in [0, 1).
    """

    def __init__(self, depth: int, widen_factor: int, drop_rate: float = 0.0, **settings: Any):
        blocks, remainder = divmod(depth - 4, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth={depth}: a wide residual network has 6 n + 4 layers (10, 16, 22, 28, ...)")
        super().__init__(
            partial(PreActivationBlock, drop_rate=drop_rate),
            [[width * widen_factor] * blocks for width in (16, 32, 64)],
            **settings,
        )
        self.bn = nn.BatchNorm2d(self.num_features, **get_device_dtype(self))
        self.act = nn.ReLU(inplace=True)
        if self.num_classes:
            nn.init.zeros_(self.fc.bias)


default_cfgs = generate_default_cfgs(
    dict.fromkeys(("wrn28_10", "wrn28_2", "wrn16_4", "wrn16_2", "wrn10_2"), cifar_cfg(paper_ids="arXiv:1605.07146"))
)


@register_model
def wrn28_10(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-28-10: 36,536,884 parameters with 100 classes."""
    return build_model_with_cfg(WideResNet, "wrn28_10", pretrained, depth=28, widen_factor=10, **kwargs)


@register_model
def wrn28_2(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-28-2: 1,467,610 parameters with 10 classes."""
    return build_model_with_cfg(WideResNet, "wrn28_2", pretrained, depth=28, widen_factor=2, **kwargs)


@register_model
def wrn16_4(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-16-4: 2,748,890 parameters with 10 classes."""
    return build_model_with_cfg(WideResNet, "wrn16_4", pretrained, depth=16, widen_factor=4, **kwargs)


@register_model
def wrn16_2(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-16-2: 691,674 parameters with 10 classes."""
    return build_model_with_cfg(WideResNet, "wrn16_2", pretrained, depth=16, widen_factor=2, **kwargs)


@register_model
def wrn10_2(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-10-2: 303,706 parameters with 10 classes."""
    return build_model_with_cfg(WideResNet, "wrn10_2", pretrained, depth=10, widen_factor=2, **kwargs)
