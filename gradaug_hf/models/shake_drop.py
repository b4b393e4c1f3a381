"""ShakeDrop: residuals scaled at random, differently forward and backward (Yamada et al., 2018, arXiv 1802.02375)."""

from typing import Any

import torch
from torch import Tensor, nn


def check_rate(name: str, rate: float) -> None:
    """Make sure that a rate is a probability below one.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{name} is {rate!r}; a drop rate lies in [0, 1)")


class _Scale(torch.autograd.Function):
    """x times alpha, whose gradient is multiplied by beta."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return x * alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (beta,) = ctx.saved_tensors
        return grad * beta, None, None


class ShakeDrop(nn.Module):
    """While training, now and then multiplies a residual by alpha, and its gradient by beta instead.

    Whether it does is drawn for the whole batch, alpha from [-1, 1] and beta from [0, 1] for each image. In eval mode
    the residual is multiplied by what is expected while training.

    Args:
        rate: Probability of scaling.

    Raises:
        ValueError: The rate is not in [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        check_rate("rate", rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Residual (N, ...) to scaled residual."""
        if not self.training:
            return x * (1 - self.rate)
        each = (len(x), *[1] * (x.ndim - 1))
        scaled = x.new_empty([1] * x.ndim).bernoulli_(self.rate)
        alpha = 1 + scaled * x.new_empty(each).uniform_(-2, 0)
        beta = 1 + scaled * x.new_empty(each).uniform_(-1, 0)
        return _Scale.apply(x, alpha, beta)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
