"""Run the shortcut that remains where a residual block is dropped (stochastic depth, arXiv 1603.09382)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shortcut:
    """Describe `act(shortcut(x))` for the first argument x of a residual block.

    Args:
        index: of the block among those of the model that can be dropped, in order of execution.
        path: name of the block's own module that x goes through; None where it is x itself.
        act: name of the one that follows the sum; None where nothing does.
    """

    index: int
    path: str | None
    act: str | None


def run_shortcut(block: nn.Module, path: str | None, act: str | None, x: Tensor) -> Any:
    """Return the output of a residual block for x without its residual branch; `path` and `act` are a `Shortcut`'s."""
    out = x if path is None else getattr(block, path)(x)
    if act is None:
        return out
    # An activation may work in place, which x, kept for the backward of the layer before, must not see.
    return getattr(block, act)(out.clone() if path is None else out)


class _ZeroGradients(torch.autograd.Function):
    """Give tensors that do not take part a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *absent: Tensor) -> Tensor:
        ctx.save_for_backward(*absent)
        return x.clone()  # a view made here could not be worked on in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def with_zero_gradients(x: Tensor, block: nn.Module) -> Tensor:
    """Return x, whose backward also gives the block's parameters a gradient, of zero."""
    return _ZeroGradients.apply(x, *(p for p in block.parameters() if p.requires_grad))
