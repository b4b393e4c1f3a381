"""Feature pyramid networks (arXiv 1612.03144) on models of timm, whose bottom-up part can be sliced."""

from collections import OrderedDict
from collections.abc import Sequence

from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

# Finer feature maps are not part of a pyramid.
FINEST_STRIDE = 4


class BottomUp(nn.Module):
    """The feature maps of a model, each through the pyramid's lateral convolution.

    This is the part of a detector that sub-networks slice: the channels of a feature map are the inputs of a lateral
    convolution, whose outputs, those of this module, stay whole. A narrower map so meets the weights of the channels
    that it has, which is the same function as a map filled up with zeros, without computing with these.

    Args:
        body: gives the feature maps (N, C, H, W), the finest first.
        in_channels: their numbers of channels.
        out_channels: number of channels of each output.
    """

    def __init__(self, body: nn.Module, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.laterals = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        for lateral in self.laterals:  # as torchvision's pyramid
            nn.init.kaiming_uniform_(lateral.weight, a=1)
            nn.init.zeros_(lateral.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (N, 3, H, W) to a list of (N, out_channels, H / stride, W / stride)."""
        return [lateral(feature) for lateral, feature in zip(self.laterals, self.body(images), strict=True)]


class Pyramid(nn.Module):
    """A feature pyramid, as torchvision's detectors take it for a backbone.

    Args:
        model: a classifier of timm, whose deepest feature map of each stride from 4 on is used. Later layers are cut
            off.
        out_channels: number of channels of each level.

    Raises:
        ValueError: the model does not give its feature maps.
    """

    def __init__(self, model: nn.Module, out_channels: int) -> None:
        super().__init__()
        indices = _deepest_of_each_stride(model)
        body = FeatureGetterNet(model, indices)
        self.strides = body.feature_info.reduction()
        self.out_channels = out_channels
        self.bottom_up = BottomUp(body, body.feature_info.channels(), out_channels)
        self.fpn = FeaturePyramidNetwork([out_channels] * len(indices), out_channels, LastLevelMaxPool())
        self.fpn.inner_blocks = nn.ModuleList(nn.Identity() for _ in indices)  # the laterals are in the bottom-up part

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) to levels "0", "1", ... and "pool", each (N, out_channels, H / stride, W / stride)."""
        return self.fpn(OrderedDict((str(level), lateral) for level, lateral in enumerate(self.bottom_up(images))))


def _deepest_of_each_stride(model: nn.Module) -> list[int]:
    info = getattr(model, "feature_info", None)
    if not hasattr(model, "forward_intermediates") or not info:
        raise ValueError(f"{type(model).__name__} does not give its feature maps, which a detector needs")
    strides = [stage["reduction"] for stage in info]
    deepest = {stride: index for index, stride in enumerate(strides) if stride >= FINEST_STRIDE}
    if not deepest:
        raise ValueError(
            f"the feature maps of {type(model).__name__} have strides {strides}; a detector needs some of at least "
            f"{FINEST_STRIDE}"
        )
    return list(deepest.values())
