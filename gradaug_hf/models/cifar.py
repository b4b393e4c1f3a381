"""The common part of the models for CIFAR: statistics of images, configuration for timm, all but their blocks."""

from collections.abc import Callable, Iterator, Sequence

import torch
from timm.layers import DropPath, calculate_drop_path_rates, create_classifier, get_device_dtype
from timm.models import checkpoint_seq
from timm.models.resnet import drop_blocks
from torch import Tensor, nn

from gradaug_hf.models.shake_drop import ShakeDrop, check_rate

CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


def cifar_cfg(**changes) -> dict:
    """Return timm's configuration of a model for 32x32 images and 100 classes, without pretrained weights."""
    return {
        "url": "",
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "min_input_size": (3, 8, 8),
        "pool_size": (8, 8),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **changes,
    }


class CifarNetwork(nn.Module):
    """Residual network for small images: 3x3 convolution, three stages of blocks, pooling, linear classifier.

    Any image of at least 8x8 pixels is accepted: the features are pooled adaptively. A subclass that has
    them replaces `bn1` and `act1` behind the first convolution, `bn` and `act` behind the last block.

    Args:
        block: Makes a residual block from its channels of input and output, its stride, the modules `drop_block` and
            `drop_path` for its residual, and `device` and `dtype` of the parameters.
        channels: Output channels of each block of each stage; the second and third stage begin with stride 2.
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
        ValueError: A rate is not in [0, 1).
    """

    STEM_CHANNELS = 16

    def __init__(
        self,
        block: Callable[..., nn.Module],
        channels: Sequence[Sequence[int]],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        shake_drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_rate("drop_path_rate", drop_path_rate)
        check_rate("drop_block_rate", drop_block_rate)
        check_rate("shake_drop_rate", shake_drop_rate)
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = channels[-1][-1]
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_chans, self.STEM_CHANNELS, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.Identity()
        self.act1 = nn.Identity()
        drop_paths = _drop_paths(drop_path_rate, shake_drop_rate, sum(map(len, channels)))
        stages, last = [], self.STEM_CHANNELS
        # timm has DropBlock settings for four stages; models for small images have the last three.
        for stage, stride, drop_block in zip(channels, (1, 2, 2), drop_blocks(drop_block_rate)[1:], strict=True):
            blocks = []
            for size in stage:
                drops = {"drop_block": drop_block() if drop_block else nn.Identity(), "drop_path": next(drop_paths)}
                blocks.append(block(last, size, 1 if blocks else stride, **drops, **dd))
                last = size
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.Identity()
        self.act = nn.Identity()
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return patterns of the parameter names in the stem and in each stage (`coarse`) or each block."""
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the linear layer that gives the logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, **get_device_dtype(self)
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features (N, num_features, H/4, W/4) of images (N, in_chans, H, W)."""
        x = self.act1(self.bn1(self.conv1(x)))
        stages = [self.layer1, self.layer2, self.layer3]
        if self.grad_checkpointing and self.training:
            x = checkpoint_seq(stages, x, flatten=True)
        else:
            for stage in stages:
                x = stage(x)
        return self.act(self.bn(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (N, num_classes) of features, or the pooled features if `pre_logits`."""
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _drop_paths(drop_path_rate: float, shake_drop_rate: float, num_blocks: int) -> Iterator[nn.Module]:
    """Yield a module for the residual of each block: ShakeDrop, stochastic depth, both or identity."""
    for number, rate in enumerate(calculate_drop_path_rates(drop_path_rate, num_blocks), start=1):
        drops = [ShakeDrop(shake_drop_rate * number / num_blocks)] if shake_drop_rate else []
        drops += [DropPath(rate)] if rate else []
        yield nn.Sequential(*drops) if len(drops) > 1 else drops[0] if drops else nn.Identity()
