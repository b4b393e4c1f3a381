"""Wide residual networks for small images in timm's registry (Zagoruyko and Komodakis, 2016, arXiv 1605.07146)."""

import torch
from timm.layers import create_classifier, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from gradaug_hf.models.cifar import cifar_cfg


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice, beside a shortcut.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the activated input.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
        drop_rate: Dropout probability between the two convolutions.
        device: Where the parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        drop_rate: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.bn1 = nn.BatchNorm2d(in_channels, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_channels, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False, **dd)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        residual = self.conv2(self.drop(self.act2(self.bn2(self.conv1(activated)))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """Pre-activation residual network of three stages, `widen_factor` times as wide as a thin one.

    Any image of at least 8x8 pixels is accepted: the features are pooled adaptively.

    Args:
        depth: Number of layers, 6 n + 4 for n blocks in each stage.
        widen_factor: The stages have 16, 32 and 64 times this many channels.
        num_classes: Number of outputs; 0 leaves the classifier out.
        in_chans: Number of image channels.
        global_pool: Pooling before the classifier: `avg`, `max`, `avgmax`, `catavgmax`, or an empty string for none.
        drop_rate: Dropout probability between the two convolutions of each block.
        device: Where the parameters are made.
        dtype: Type of the parameters.

    Raises:
        ValueError: `depth` is not 6 n + 4.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        blocks, remainder = divmod(depth - 4, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth={depth}: a wide residual network has 6 n + 4 layers (10, 16, 22, 28, ...)")
        dd = {"device": device, "dtype": dtype}
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = widths[-1]
        self.grad_checkpointing = False

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            first = PreActivationBlock(in_channels, out_channels, stride, drop_rate, **dd)
            others = (PreActivationBlock(out_channels, out_channels, 1, drop_rate, **dd) for _ in range(blocks - 1))
            return nn.Sequential(first, *others)

        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **dd)
        self.layer1 = stage(16, widths[0], stride=1)
        self.layer2 = stage(widths[0], widths[1], stride=2)
        self.layer3 = stage(widths[1], widths[2], stride=2)
        self.bn = nn.BatchNorm2d(self.num_features, **dd)
        self.act = nn.ReLU(inplace=True)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of parameter names that make up the stem and each stage (`coarse`) or each block."""
        return {"stem": r"^conv1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear layer that gives the logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: Number of outputs; 0 leaves the classifier out.
            global_pool: Pooling before the classifier; None keeps it.
        """
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, **get_device_dtype(self)
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to features (N, num_features, H/4, W/4)."""
        x = self.conv1(x)
        stages = [self.layer1, self.layer2, self.layer3]
        if self.grad_checkpointing and self.training:
            x = checkpoint_seq(stages, x, flatten=True)
        else:
            for stage in stages:
                x = stage(x)
        return self.act(self.bn(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (N, num_classes), or to pooled features if `pre_logits`."""
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(
    dict.fromkeys(("wrn28_10", "wrn28_2", "wrn16_4", "wrn16_2"), cifar_cfg(paper_ids="arXiv:1605.07146"))
)


def _wide_resnet(name: str, pretrained: bool, depth: int, widen_factor: int, **kwargs) -> WideResNet:
    return build_model_with_cfg(WideResNet, name, pretrained, depth=depth, widen_factor=widen_factor, **kwargs)


@register_model
def wrn28_10(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-28-10: 36,536,884 parameters with 100 classes."""
    return _wide_resnet("wrn28_10", pretrained, depth=28, widen_factor=10, **kwargs)


@register_model
def wrn28_2(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-28-2: 1,467,610 parameters with 10 classes."""
    return _wide_resnet("wrn28_2", pretrained, depth=28, widen_factor=2, **kwargs)


@register_model
def wrn16_4(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-16-4: 2,748,890 parameters with 10 classes."""
    return _wide_resnet("wrn16_4", pretrained, depth=16, widen_factor=4, **kwargs)


@register_model
def wrn16_2(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-16-2: 691,674 parameters with 10 classes."""
    return _wide_resnet("wrn16_2", pretrained, depth=16, widen_factor=2, **kwargs)
