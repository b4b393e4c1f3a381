"""Gives leaf modules views of their own parameters at the current width, without touching the state dict.

A module's class is exchanged for a subclass whose `weight`, `bias`, `groups`, ... are properties. They read the stored
parameter and return the part that the current width keeps, so that the module's own forward, autograd, the optimiser,
`state_dict` and DDP work unmodified. A residual block's subclass gives its shortcut while the block is dropped.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaug_hf.slimming.patterns import Pattern, Width, pattern_size, take_patterns
from gradaug_hf.slimming.shortcuts import Shortcut, run_shortcut, with_zero_gradients

# What a patched network itself carries; the report only once it was made slimmable.
NETWORK_ATTRIBUTES = ("_width_state", "_slicing_report")
BATCH_NORM_STATE = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class WidthState:
    """What all patched modules of one network share.

    Args:
        width: the width of the sliced ones.
        subnet_pass: whether the training pass of a sub-network is under way.
        dropped: indices of the residual blocks that are dropped.
        num_blocks: how many residual blocks can be.
    """

    width: Width = field(default_factory=Width)
    subnet_pass: bool = False
    dropped: frozenset[int] = frozenset()
    num_blocks: int = 0

    @property
    def is_subnet(self) -> bool:
        return self.subnet_pass or self.width.multiplier < 1


@dataclass(frozen=True)
class Slices:
    """What of one module is sliced.

    Args:
        tensors: name of a parameter or buffer -> the pattern of each dimension.
        attributes: name of an attribute -> the patterns whose sizes it holds.
        written: names of buffers that the module writes to while training; a sub-network writes to a copy.
        caches: names of dictionaries in which the module keeps what it made of its parameters; a sub-network has its
            own for as long as its width is set.
    """

    tensors: dict[str, tuple[Pattern, ...]] = field(default_factory=dict)
    attributes: dict[str, tuple[Pattern, ...]] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    caches: frozenset[str] = frozenset()


class SlimModule(nn.Module):
    """Base of the classes that sliced modules are given. Never instantiated by itself."""

    _slices: Slices
    _state: WidthState
    _overrides: dict[str, Any]
    _subnet_caches: dict[str, tuple[Width, dict]]

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _rebuild, type(self)._made_of, self.__dict__


class DroppableBlock(SlimModule):
    """Base of the classes that residual blocks are given which can be dropped. Never instantiated by itself."""

    _shortcut: Shortcut

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shortcut = self._shortcut
        if shortcut.index not in self._state.dropped:
            return super().forward(*args, **kwargs)
        out = run_shortcut(self, shortcut.path, shortcut.act, args[0])
        # Several processes wait for the gradient of every parameter.
        return with_zero_gradients(out, self) if dist.is_available() and dist.is_initialized() else out


class StridedConvolution(SlimModule):
    """Base of the classes that strided 1 x 1 convolutions are given. Never instantiated by itself.

    With fewer input channels than oneDNN's block (8 or 16, by instruction set) and a channels-last input, the weight
    gradient of such a convolution writes past its workspace: wrong gradients, a crash or a hang
    (https://github.com/uxlfoundation/oneDNN/issues/6035). The workspace serves only an input whose sides are those of
    the output times the stride; without its last rows and columns, which no output reads, the input has other sides.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.in_channels // self.groups < 16 and x.device.type == "cpu":
            space = x.shape[-len(self.stride) :]
            read = [(size - 1) // stride * stride + 1 for size, stride in zip(space, self.stride, strict=True)]
            x = x[(..., *(slice(size) for size in read))]
        return super().forward(x, *args, **kwargs)


def _is_strided_pointwise(module: nn.Module) -> bool:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return False
    unpadded = module.padding == "valid" or set(module.padding) == {0}
    return unpadded and set(module.kernel_size) == {1} and max(module.stride) > 1


def _kind(module: nn.Module, is_droppable: bool) -> type[SlimModule]:
    if is_droppable:
        return DroppableBlock
    return StridedConvolution if _is_strided_pointwise(module) else SlimModule


def _rebuild(*made_of: Any) -> nn.Module:
    cls = _slim_class(*made_of)
    return cls.__new__(cls)


@cache
def _slim_class(
    kind: type[SlimModule],
    base: type[nn.Module],
    tensors: tuple[str, ...],
    attributes: tuple[str, ...],
    caches: tuple[str, ...],
) -> type[nn.Module]:
    properties = {name: _tensor_property(name) for name in tensors}
    properties |= {name: _attribute_property(name) for name in attributes}
    properties |= {name: _cache_property(name) for name in caches}
    if issubclass(base, _BatchNorm):
        properties |= {name: _tensor_property(name) for name in BATCH_NORM_STATE}
        properties |= {"momentum": _override_property("momentum"), "track_running_stats": _tracking_property()}
    names = {"_unsliced": base, "_made_of": (kind, base, tensors, attributes, caches), "__module__": base.__module__}
    return type(base.__name__, (kind, base), {**properties, **names})


def _tensor_property(name: str) -> property:
    def get(self: SlimModule) -> torch.Tensor | None:
        if name in self._overrides:
            return self._overrides[name]
        parameters = self.__dict__["_parameters"]
        tensor = parameters[name] if name in parameters else self.__dict__["_buffers"][name]
        state = self._state
        if tensor is None or not state.is_subnet:
            return tensor
        if state.width.multiplier < 1 and name in self._slices.tensors:
            tensor = take_patterns(tensor, self._slices.tensors[name], state.width)
        return tensor.clone() if self.training and name in self._slices.written else tensor

    return property(get)


def _attribute_property(name: str) -> property:
    def get(self: SlimModule) -> int | tuple[int, ...] | list[int]:
        value = self.__dict__[name]
        width = self._state.width
        if width.multiplier >= 1:
            return value
        sizes = tuple(pattern_size(pattern, width) for pattern in self._slices.attributes[name])
        return type(value)(sizes) if isinstance(value, (tuple, list)) else sizes[0]

    return property(get, _set_in_dict(name))


def _cache_property(name: str) -> property:
    """Each setting of a width is a new `Width` object, so that none finds what another one has kept."""

    def get(self: SlimModule) -> dict:
        width = self._state.width
        if width.multiplier >= 1:
            return self.__dict__[name]
        if name not in self._subnet_caches or self._subnet_caches[name][0] is not width:
            self._subnet_caches[name] = width, {}
        return self._subnet_caches[name][1]

    def set_value(self: SlimModule, value: dict) -> None:
        self._subnet_caches.pop(name, None)
        self.__dict__[name] = value

    return property(get, set_value)


def _override_property(name: str) -> property:
    return property(
        lambda self: self._overrides[name] if name in self._overrides else self.__dict__[name], _set_in_dict(name)
    )


def _tracking_property() -> property:
    """A training sub-network uses batch statistics and writes none, unless its own are being measured."""

    def get(self: SlimModule) -> bool:
        if self._overrides or not (self.training and self._state.is_subnet):
            return self.__dict__["track_running_stats"]
        return False

    return property(get, _set_in_dict("track_running_stats"))


def _set_in_dict(name: str) -> Any:
    def set_value(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    return set_value


def patch(
    network: nn.Module, slices: Mapping[str, Slices], shortcuts: Mapping[str, Shortcut], state: WidthState
) -> None:
    """Make modules slimmable and residual blocks droppable in place.

    Args:
        network: the network, unpatched; gets an attribute `_width_state`.
        slices: module name -> what of it is sliced. Every batch norm is patched, sliced or not.
        shortcuts: block name -> what stays of it when it is dropped.
        state: the width and the dropped blocks that they share.
    """
    for name, module in network.named_modules():
        if name not in slices and name not in shortcuts and not isinstance(module, _BatchNorm):
            continue
        own = slices.get(name) or Slices()
        kind = _kind(module, name in shortcuts)
        tensors = tuple(sorted({*own.tensors, *own.written}))
        module.__class__ = _slim_class(
            kind, type(module), tensors, tuple(sorted(own.attributes)), tuple(sorted(own.caches))
        )
        module._slices, module._state, module._overrides, module._subnet_caches = own, state, {}, {}
        if name in shortcuts:
            module._shortcut = shortcuts[name]
    state.num_blocks = len(shortcuts)
    network._width_state = state


def slices_of(network: nn.Module) -> dict[str, Slices]:
    """Module name -> what of it is sliced, of a patched network."""
    return {name: module._slices for name, module in network.named_modules() if isinstance(module, SlimModule)}


def shortcuts_of(network: nn.Module) -> dict[str, Shortcut]:
    """Block name -> what stays of it when it is dropped, of a patched network."""
    return {name: module._shortcut for name, module in network.named_modules() if isinstance(module, DroppableBlock)}


def unpatch(network: nn.Module) -> None:
    """Give patched modules their own classes back."""
    for module in network.modules():
        if isinstance(module, SlimModule):
            module.__class__ = type(module)._unsliced
            for name in ("_slices", "_state", "_overrides", "_subnet_caches", "_shortcut"):
                vars(module).pop(name, None)
        for name in NETWORK_ATTRIBUTES:
            vars(module).pop(name, None)


def width_state(model: nn.Module) -> WidthState:
    """The width state of a slimmable network, also inside a wrapper such as DDP.

    Raises:
        ValueError: `make_slimmable` was not called on the model.
    """
    for module in model.modules():
        if "_slicing_report" in vars(module):
            return module._width_state
    raise ValueError(f"{type(model).__name__} is not slimmable: call gradaug_hf.make_slimmable(model) first")


def is_slimmable(model: nn.Module) -> bool:
    """Whether `make_slimmable` was called on a model, or on what it wraps."""
    return any("_slicing_report" in vars(module) for module in model.modules())


def num_droppable_blocks(model: nn.Module) -> int:
    """How many residual blocks of a network can be dropped: 0 unless `make_droppable` was called on it."""
    state = _state_in(model)
    return 0 if state is None else state.num_blocks


def _state_in(model: nn.Module) -> WidthState | None:
    return next((vars(module)["_width_state"] for module in model.modules() if "_width_state" in vars(module)), None)


def check_width(width: float) -> float:
    if not 0 < width <= 1:
        raise ValueError(f"width is {width!r}; a width multiplier lies in (0, 1]")
    return float(width)


def set_width(model: nn.Module, width: float) -> None:
    """Set the width multiplier of a slimmable network.

    Args:
        model: a network that `make_slimmable` was called on, or a wrapper of one.
        width: width multiplier in (0, 1]; 1 is the full network.

    Raises:
        ValueError: the width is out of range, or the model is not slimmable.
    """
    state = width_state(model)
    state.width = Width(check_width(width), state.width.divisor)


@contextmanager
def at_width(model: nn.Module, width: float) -> Iterator[nn.Module]:
    """Use a slimmable network at a width multiplier; the width it had comes back, also after an exception.

    Args:
        model: a network that `make_slimmable` was called on, or a wrapper of one.
        width: width multiplier in (0, 1].

    Raises:
        ValueError: the width is out of range, or the model is not slimmable.
    """
    state = width_state(model)
    before = state.width
    set_width(model, width)
    try:
        yield model
    finally:
        state.width = before


@contextmanager
def subnet_pass(model: nn.Module, width: float, dropped: Collection[int] = ()) -> Iterator[nn.Module]:
    """`at_width` for the training pass of a sub-network: no statistics are written, also at width 1.

    Args:
        model: a network that `make_slimmable` was called on, or a wrapper of one; one that `make_droppable` was
            called on does as well at width 1.
        width: width multiplier in (0, 1].
        dropped: indices of the residual blocks that are replaced by their shortcuts.

    Raises:
        ValueError: the width is out of range, or the model is not slimmable.
    """
    droppable = num_droppable_blocks(model) > 0
    state = _state_in(model) if droppable and width == 1 else width_state(model)
    before = state.width, state.subnet_pass, state.dropped
    state.width = Width(check_width(width), state.width.divisor)
    state.subnet_pass, state.dropped = True, frozenset(dropped)
    try:
        yield model
    finally:
        state.width, state.subnet_pass, state.dropped = before
