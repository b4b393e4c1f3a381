"""ShakeDrop: residuals scaled at random, differently forward and backward (Yamada et al., 2018, arXiv 1802.02375)."""

from typing import Any

import torch
from torch import Tensor, nn


def check_rate(name: str, rate: float) -> None:
    """Raise a ValueError unless a rate is a probability below one."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} is {rate!r}; a drop rate lies in [0, 1)")


class _Scale(torch.autograd.Function):
    """Multiply x by alpha, and its gradient by beta."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return x * alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (beta,) = ctx.saved_tensors
        return grad * beta, None, None


class ShakeDrop(nn.Module):
    """Multiply a residual by alpha now and then while training, and its gradient by beta instead.

    Scaling is sampled for the whole batch, alpha from [-1, 1] and beta from [0, 1] for each image. In eval mode the
    residual is multiplied by the expected factor of training.

    Args:
        rate: Probability of scaling.
        scale_by_keep: Whether to divide by the expected factor while training, and leave the residual as it is in
            eval mode, as timm's DropPath does: the trained weights then are those of the model without ShakeDrop.

    Raises:
        ValueError: The rate is not in [0, 1).
    """

    def __init__(self, rate: float, scale_by_keep: bool = False):
        super().__init__()
        check_rate("rate", rate)
        self.rate = rate
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled residual (N, ...)."""
        expected = 1 - self.rate
        if not self.training:
            return x if self.scale_by_keep else x * expected
        each = (len(x), *[1] * (x.ndim - 1))
        scaled = x.new_empty([1] * x.ndim).bernoulli_(self.rate)
        alpha = 1 + scaled * x.new_empty(each).uniform_(-2, 0)
        beta = 1 + scaled * x.new_empty(each).uniform_(-1, 0)
        if self.scale_by_keep:
            alpha, beta = alpha / expected, beta / expected
        return _Scale.apply(x, alpha, beta)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}, scale_by_keep={self.scale_by_keep}"


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a timm model that have a `drop_path` for their residual, whatever it is now."""
    return [module for module in model.modules() if hasattr(module, "drop_path")]


def add_shake_drop(model: nn.Module, rate: float) -> None:
    """Have the residuals of a timm model scaled by ShakeDrop in place; its state dict does not change.

    Raises:
        ValueError: There is no such block, or the rate is not in [0, 1).
    """
    check_rate("shake_drop_rate", rate)
    blocks = residual_blocks(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no residual block with a drop_path, which ShakeDrop replaces")
    for number, block in enumerate(blocks, start=1):
        block.drop_path = ShakeDrop(rate * number / len(blocks), scale_by_keep=True).train(block.training)
