"""Arguments of timm's constructors that give a network the widths of one of its sub-networks."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from itertools import combinations
from typing import Any

import timm
import torch
from timm.models._input import get_model_args
from torch import nn

from gradaug_hf.hub.configs import tensor_shapes
from gradaug_hf.slimming.patterns import Width, kept_channels

# What the name of an argument holds that states no width.
NO_WIDTHS = ("num_classes", "in_chans", "size", "depth", "layers", "stride", "dilation", "indices")
# Combinations of arguments that are tried, each by building a network on the meta device.
MAX_TRIES = 64


def narrow_arguments(network: nn.Module, subnet: nn.Module, width: Width) -> dict[str, Any] | None:
    """Arguments with which `timm.create_model` gives every tensor the shape that a sub-network has; None if none do.

    Each argument that is an integer, or several, may be a width: it is scaled as the channels are, alone and together
    with others, until the shapes are the same. Equal shapes are not yet an equal function.

    Args:
        network: built by timm, at full width.
        subnet: its sub-network, as `extract_subnet` gives it.
        width: that of the sub-network.
    """
    name, given = network.pretrained_cfg["architecture"], get_model_args(network)
    wanted, full = tensor_shapes(subnet), tensor_shapes(network)
    if wanted == full:
        return given
    scaled = {k: _scaled(v, width) for k, v in constructor_arguments(name, given).items() if _may_be_width(k, v)}
    useful = {k: v for k, v in scaled.items() if _shapes_with(name, given | {k: v}) != full}
    tries = (names for count in range(len(useful), 0, -1) for names in combinations(useful, count))
    for names, _ in zip(tries, range(MAX_TRIES), strict=False):
        arguments = given | {k: useful[k] for k in names}
        if _shapes_with(name, arguments) == wanted:
            return arguments
    return None


def constructor_arguments(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What timm passes to the class of a network, with the defaults of the class.

    Args:
        name: in timm's registry.
        given: arguments of `timm.create_model`.
    """
    with torch.device("meta"):
        kind = type(timm.create_model(name, **given))
        with _recorded(kind) as arguments:
            timm.create_model(name, **given)
    return arguments


@contextmanager
def _recorded(kind: type) -> Iterator[dict[str, Any]]:
    """The arguments with which the first instance of a class is made meanwhile."""
    construct, arguments = kind.__init__, {}

    @wraps(construct)
    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        if not arguments:
            bound = inspect.signature(construct).bind(self, *args, **kwargs)
            bound.apply_defaults()
            arguments.update(list(bound.arguments.items())[1:])
        construct(self, *args, **kwargs)

    kind.__init__ = record
    try:
        yield arguments
    finally:
        kind.__init__ = construct


def _may_be_width(name: str, value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) and value else [value]
    return all(type(each) is int for each in values) and not any(part in name for part in NO_WIDTHS)


def _scaled(value: Any, width: Width) -> Any:
    if isinstance(value, (tuple, list)):
        return [_scaled(each, width) for each in value]
    return kept_channels(value, width.multiplier, width.divisor)


def _shapes_with(name: str, arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    try:
        with torch.device("meta"):
            return tensor_shapes(timm.create_model(name, **arguments))
    except Exception:  # timm's constructors raise errors of many kinds for arguments that do not fit each other
        return None
