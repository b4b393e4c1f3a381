"""Copy a sub-network into a dense module of its own."""

import copy

import torch
from torch import nn

from gradaug_hf.slimming.patching import Slices, SlimModule, slices_of, unpatch
from gradaug_hf.slimming.patterns import Width, pattern_size, take_pattern
from gradaug_hf.slimming.widths import check_width, width_state


def extract_subnet(model: nn.Module, width: float) -> nn.Module:
    """Copy the sub-network of a width multiplier into a dense, narrower model that runs without gradaug_hf.

    Args:
        model: a model that `make_slimmable` was called on.
        width: width multiplier in (0, 1].

    Returns:
        A module of the same classes with smaller parameters. Its outputs are those of `at_width(model, width)`; its
        batch-norm statistics are the kept channels of the full model's, or the recalibrated ones where it is called
        inside `recalibrate_batchnorm(model, width, ...)`.

    Raises:
        ValueError: the width is out of range, or the model is not slimmable.

    Examples:
        >>> narrow = extract_subnet(make_slimmable(model), 0.5)
        >>> sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())
        True
    """
    width = check_width(width)
    state = width_state(model)
    subnet = copy.deepcopy(model)
    slices = slices_of(subnet)
    overrides = {module: module._overrides for module in subnet.modules() if isinstance(module, SlimModule)}
    unpatch(subnet)
    narrow(subnet, slices, Width(width, state.width.divisor))
    if state.width.multiplier == width:  # recalibrated statistics are kept; other overrides are of their measurement
        for module, own in overrides.items():
            module._buffers.update({name: value for name, value in own.items() if name in module._buffers})
    return subnet


def narrow(network: nn.Module, slices: dict[str, Slices], width: Width) -> None:
    """Replace the parameters, buffers and sizes of an unpatched model by their kept parts, in place."""
    replaced: dict[int, nn.Parameter] = {}
    for module_name, own in slices.items():
        module = network.get_submodule(module_name)
        for name, patterns in own.tensors.items():
            if name in module._parameters:
                parameter = module._parameters[name]
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = _narrow_parameter(parameter, patterns, width)
                module._parameters[name] = replaced[id(parameter)]
            else:
                module._buffers[name] = _narrow_tensor(module._buffers[name], patterns, width)
        for name, patterns in own.attributes.items():
            sizes = tuple(pattern_size(pattern, width) for pattern in patterns)
            value = vars(module)[name]
            vars(module)[name] = type(value)(sizes) if isinstance(value, (tuple, list)) else sizes[0]
        for name in own.caches:
            vars(module)[name] = {}


def _narrow_parameter(parameter: nn.Parameter, patterns: tuple, width: Width) -> nn.Parameter:
    narrowed = nn.Parameter(_narrow_tensor(parameter, patterns, width), parameter.requires_grad)
    # Parameters of another class or with marks on them (sharding, no weight decay) keep these.
    vars(narrowed).update(vars(parameter))
    return narrowed


def _narrow_tensor(tensor: torch.Tensor, patterns: tuple, width: Width) -> torch.Tensor:
    tensor = tensor.detach()
    for dim, pattern in enumerate(patterns):
        tensor = take_pattern(tensor, dim, pattern, width)
    return tensor.clone(memory_format=torch.preserve_format)
