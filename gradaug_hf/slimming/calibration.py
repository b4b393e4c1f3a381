"""Measure batch-norm statistics of a sub-network without touching those of the full model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaug_hf.slimming.patching import SlimModule
from gradaug_hf.slimming.widths import at_width


@contextmanager
def recalibrate_batchnorm(model: nn.Module, width: float, batches: Iterable[torch.Tensor]) -> Iterator[nn.Module]:
    """Evaluate the sub-network of a width with batch-norm statistics of its own (arXiv 1903.05134).

    Inside the context the model runs at this width, and in eval mode uses the mean and variance averaged over the
    batches. Afterwards width and statistics are what they were, bit-identical, also after an exception.

    Args:
        model: a model that `make_slimmable` was called on, or a wrapper of one.
        width: width multiplier in (0, 1].
        batches: image batches (N, C, H, W) on the model's device, of training images as the model is evaluated on.

    Raises:
        ValueError: the width is out of range, the model is not slimmable, or there is no batch.

    Examples:
        >>> with recalibrate_batchnorm(make_slimmable(model), 0.5, [images]):
        ...     logits = model.eval()(images)
    """
    norms = [m for m in model.modules() if isinstance(m, SlimModule) and isinstance(m, _BatchNorm)]
    norms = [norm for norm in norms if norm._buffers.get("running_mean") is not None]
    with at_width(model, width):
        try:
            for norm in norms:
                norm._overrides.update(_fresh_statistics(norm))
            _measure(model, norms, batches)
            yield model
        finally:
            for norm in norms:
                norm._overrides.clear()


def _fresh_statistics(norm: Any) -> dict[str, Any]:
    """Return the statistics before the first batch; without a momentum the average over all batches is taken."""
    mean, var = norm.running_mean, norm.running_var
    return {
        "running_mean": torch.zeros_like(mean),
        "running_var": torch.ones_like(var),
        "num_batches_tracked": torch.zeros((), dtype=torch.long, device=mean.device),
        "momentum": None,
    }


@torch.no_grad()
def _measure(model: nn.Module, norms: list[nn.Module], batches: Iterable[torch.Tensor]) -> None:
    modes = {module: module.training for module in model.modules()}
    seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.training = True
        for batch in batches:
            model(batch)
            seen += 1
    finally:
        for module, training in modes.items():
            module.training = training
    if not seen:
        raise ValueError("batches is empty; batch-norm statistics need at least one image batch")
