"""Add the gradients of slices to those of their parameters in place, rather than by full-size ones of zeros.

The backward of a view makes a full-size gradient of zeros, copies that of the slice into it, and adds it up: three
walks over memory as large as the parameter. Here a slice is a leaf of its own, whose gradient is added in its place.
"""

import torch
from torch import Tensor, nn

from gradaug_hf.slimming.patterns import Cut, Width

# Of smaller ones the three walks take less time than the call of a hook.
FEWEST_ELEMENTS = 2**17


def can_add_directly(tensor: Tensor) -> bool:
    """Return True for a large parameter that has gradients, and no hook that waits for them."""
    return (
        type(tensor) is nn.Parameter
        and tensor.numel() >= FEWEST_ELEMENTS
        and tensor.requires_grad
        and torch.is_grad_enabled()
        and not tensor._backward_hooks
        and not tensor._post_accumulate_grad_hooks
    )


def direct_slice(parameter: nn.Parameter, cut: Cut, width: Width) -> Tensor:
    """Return the part of a parameter that prefixes keep as a leaf whose gradient is added to the parameter's."""
    part = cut.view(parameter.detach(), width)
    if part.shape == parameter.shape:
        return parameter

    def add(part: Tensor) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True is not for GradAug.backward; call GradAug.loss, and its backward")
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        cut.view(parameter.grad, width).add_(part.grad)
        part.grad = None

    part.requires_grad_().register_post_accumulate_grad_hook(add)
    return part
