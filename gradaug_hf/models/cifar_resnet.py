"""Residual networks for CIFAR in timm's registry (He et al., 2015, arXiv 1512.03385, section 4.2)."""

from collections.abc import Callable

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from gradaug_hf.models.cifar import CifarNetwork, cifar_cfg


class BasicBlock(nn.Module):
    """3x3 convolution and batch norm, twice, beside a shortcut, with ReLU in between and behind the sum.

    Where number of channels or stride changes, the shortcut is a 1x1 convolution and batch norm.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
        drop_block: Makes the DropBlock behind the first norm; None for none.
        drop_path: Applied to the residual.
        device: Where the parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        drop_block: Callable[[], nn.Module] | None,
        drop_path: nn.Module,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(out_channels, **dd)
        self.drop_block = nn.Identity() if drop_block is None else drop_block()
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
        num_classes: Number of outputs; 0 leaves the classifier out.
        in_chans: Number of image channels.
        global_pool: Pooling before the classifier: `avg`, `max`, `avgmax`, `catavgmax`, or an empty string for none.
        drop_path_rate: Probability of dropping the last block's residual (stochastic depth, arXiv 1603.09382); it
            rises linearly from 0 at the first block.
        drop_block_rate: Drop probability of DropBlock (arXiv 1810.12890) in the last two stages.
        shake_drop_rate: Probability of scaling the last block's residual (ShakeDrop, arXiv 1802.02375); it rises
            linearly from block to block.
        device: Where the parameters are made.
        dtype: Type of the parameters.

    Raises:
        ValueError: `depth` is not 6 n + 2, or a rate is not in [0, 1).
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        shake_drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth={depth}: a residual network for CIFAR has 6 n + 2 layers (8, 14, 20, 26, ...)")
        super().__init__(
            BasicBlock,
            [[width] * blocks for width in (16, 32, 64)],
            num_classes,
            in_chans,
            global_pool,
            drop_path_rate,
            drop_block_rate,
            shake_drop_rate,
            device,
            dtype,
        )
        self.bn1 = nn.BatchNorm2d(self.STEM_CHANNELS, device=device, dtype=dtype)
        self.act1 = nn.ReLU(inplace=True)


default_cfgs = generate_default_cfgs(
    dict.fromkeys(("resnet110_cifar", "resnet56_cifar", "resnet20_cifar"), cifar_cfg(paper_ids="arXiv:1512.03385"))
)


def _cifar_resnet(name: str, pretrained: bool, depth: int, **kwargs) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, name, pretrained, depth=depth, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-110: 1,736,564 parameters with 100 classes."""
    return _cifar_resnet("resnet110_cifar", pretrained, depth=110, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-56: 861,620 parameters with 100 classes."""
    return _cifar_resnet("resnet56_cifar", pretrained, depth=56, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-20: 278,324 parameters with 100 classes."""
    return _cifar_resnet("resnet20_cifar", pretrained, depth=20, **kwargs)
