"""Give leaf modules views of their own parameters at the current width, without touching the state dict.

A module's class is exchanged for a subclass whose `weight`, `bias`, `groups`, ... are properties. They read the stored
parameter and return the part that the current width keeps, so that the module's own forward, autograd, the optimiser,
`state_dict` and DDP work unmodified. Of a buffer that the forward writes to, a sub-network has a copy of its own while
its width is set. A residual block's subclass gives its shortcut while the block is dropped.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaug_hf.slimming.buffers import BufferCopy, BufferGuard, version_of
from gradaug_hf.slimming.changes import mark, unmark
from gradaug_hf.slimming.gradients import can_add_directly, direct_slice
from gradaug_hf.slimming.patterns import Cut, Pattern, Width, pattern_size
from gradaug_hf.slimming.shortcuts import Shortcut, run_shortcut, with_zero_gradients
from gradaug_hf.slimming.sync_batchnorm import CpuSyncBatchNorm

# What a patched model itself carries; the report only once it was made slimmable.
MODEL_ATTRIBUTES = ("_width_state", "_slicing_report")
BATCH_NORM_STATE = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(eq=False)
class WidthState:
    """Hold the state that all patched modules of one model share.

    Args:
        width: the width of the sliced ones.
        subnet_pass: True while the training pass of a sub-network is under way.
        dropped: indices of the residual blocks that are dropped.
        direct: True while the backward of a pass may add the gradients of slices to the parameters' in place.
        num_blocks: number of residual blocks that can be dropped.
        own_buffers: for each module whose forward writes to buffers, those of the sub-network whose width is set.
        guard: of the model's other buffers.
    """

    width: Width = field(default_factory=Width)
    subnet_pass: bool = False
    dropped: frozenset[int] = frozenset()
    direct: bool = False
    num_blocks: int = 0
    own_buffers: list[dict[str, BufferCopy]] = field(default_factory=list)
    guard: BufferGuard = field(default_factory=lambda: BufferGuard([]))

    def set(
        self, width: Width, subnet_pass: bool = False, dropped: Collection[int] = (), direct: bool = False
    ) -> None:
        """Switch to another sub-network, or to the full model."""
        self.width, self.subnet_pass, self.dropped, self.direct = width, subnet_pass, frozenset(dropped), direct
        for buffers in self.own_buffers:
            buffers.clear()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the sub-network that is set now when the context ends, also after an exception."""
        before = self.width, self.subnet_pass, self.dropped, self.direct
        try:
            yield
        finally:
            self.set(*before)

    @property
    def is_subnet(self) -> bool:
        return self.subnet_pass or self.width.multiplier < 1


@dataclass(frozen=True)
class Slices:
    """Name the parts of one module that are sliced, and those that a sub-network has for itself.

    Args:
        tensors: name of a parameter or buffer -> the pattern of each dimension.
        attributes: name of an attribute -> the patterns whose sizes it holds.
        written: names of buffers that the forward writes to; a sub-network has copies of its own for as long as its
            width is set.
        caches: names of dictionaries in which the module keeps what it made of its parameters; a sub-network has its
            own for as long as its width is set.
    """

    tensors: dict[str, tuple[Pattern, ...]] = field(default_factory=dict)
    attributes: dict[str, tuple[Pattern, ...]] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    caches: set[str] = field(default_factory=set)


class SlimModule(nn.Module):
    """Base of the classes that sliced modules are given. Never instantiated by itself."""

    _slices: Slices
    _cuts: dict[str, Cut]
    _state: WidthState
    _full: dict[str, Any]
    _overrides: dict[str, Any]
    _subnet_caches: dict[str, tuple[Width, dict]]
    _subnet_buffers: dict[str, BufferCopy]

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _rebuild, type(self)._made_of, self.__dict__

    # Pruning, parametrizations and the older norms of weights exchange parameters for others and compute them anew.
    # The module is a plain one first: then they work, and the next sub-network is refused because the model changed.

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as a plain module does; one of a new name makes the module a plain one."""
        if name not in self._parameters:
            _unpatch_module(self)
            return self.register_parameter(name, param)
        return super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            _unpatch_module(self)
            delattr(self, name)
        else:
            super().__delattr__(name)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(_needs_plain_classes("torch.jit.script"))

    @property
    def qconfig(self) -> Any:
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise RuntimeError(_needs_plain_classes("torch.ao.quantization"))


def _needs_plain_classes(caller: str) -> str:
    return (
        f"{caller} goes by the classes of layers, which a slimmable model has exchanged: call "
        "gradaug_hf.unpatch(model) first"
    )


class SlimBatchNorm(SlimModule):
    """Base of the classes that batch norms are given. Never instantiated by itself."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Normalise by the batch, or, where a sub-network has a single value of each channel, by running statistics.

        The full model sees larger images: the last batch of an epoch, of one image, may leave it several positions and
        its sub-network one.
        """
        x = next(iter((*args, *kwargs.values())))
        alone = self.training and self._state.is_subnet and x.numel() == x.shape[1]
        if not alone or self._overrides or _is_synchronised(self):
            return super().forward(*args, **kwargs)
        self.training = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = True


def _is_synchronised(norm: nn.Module) -> bool:
    """Return True where the values of other processes count too, and wait for this one's."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and isinstance(norm, (nn.SyncBatchNorm, CpuSyncBatchNorm))


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
    if isinstance(module, _BatchNorm):
        return SlimBatchNorm
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
    written: tuple[str, ...],
) -> type[nn.Module]:
    properties: dict[str, Any] = {name: _tensor_property(name) for name in (*tensors, *written)}
    properties |= {name: _attribute_property(name) for name in attributes}
    properties |= {name: _cache_property(name) for name in caches}
    if issubclass(base, _BatchNorm):
        properties |= {name: _tensor_property(name) for name in BATCH_NORM_STATE}
        properties |= {"momentum": _override_property("momentum"), "track_running_stats": _tracking_property()}
    if written:
        properties["__setattr__"] = _buffer_setter(base, written)
    made_of = kind, base, tensors, attributes, caches, written
    names = {"_unsliced": base, "_made_of": made_of, "__module__": base.__module__}
    return type(base.__name__, (kind, base), {**properties, **names})


def _tensor_property(name: str) -> property:
    def get(self: SlimModule) -> torch.Tensor | None:
        if name in self._overrides:
            return self._overrides[name]
        parameters = self.__dict__["_parameters"]
        tensor = parameters[name] if name in parameters else self.__dict__["_buffers"][name]
        if tensor is None or not self._state.is_subnet:
            return tensor
        return _own_buffer(self, name, tensor) if name in self._slices.written else _kept_part(self, name, tensor)

    return property(get)


def _kept_part(module: SlimModule, name: str, tensor: torch.Tensor) -> torch.Tensor:
    state = module._state
    cut = module._cuts.get(name) if state.width.multiplier < 1 else None
    if cut is None or type(tensor).__name__ == "DTensor":  # not gathered by FSDP2: asked for its dtype or device alone
        return tensor
    if not torch.compiler.is_compiling() and state.direct and not cut.others and can_add_directly(tensor):
        return direct_slice(tensor, cut, state.width)
    return cut.take(tensor, state.width)


def _own_buffer(module: SlimModule, name: str, source: torch.Tensor) -> Any:
    own = module._subnet_buffers
    if name not in own or not own[name].is_of(source):
        own[name] = BufferCopy(source, _kept_part(module, name, source).clone(), version_of(source))
    return own[name].value


def _buffer_setter(base: type[nn.Module], written: tuple[str, ...]) -> Callable[[nn.Module, str, Any], None]:
    """Return a `__setattr__` with which a sub-network's forward assigns to its own buffers."""

    def set_attribute(self: SlimModule, name: str, value: Any) -> None:
        if name in written and name in self._buffers and self._state.is_subnet:
            source = self._buffers[name]
            self._subnet_buffers[name] = BufferCopy(source, value, version_of(source))
        else:
            base.__setattr__(self, name, value)

    return set_attribute


def _attribute_property(name: str) -> property:
    def get(self: SlimModule) -> int | tuple[int, ...] | list[int]:
        value = self._full[name]
        width = self._state.width
        if width.multiplier >= 1:
            return value
        sizes = tuple(pattern_size(pattern, width) for pattern in self._slices.attributes[name])
        return type(value)(sizes) if isinstance(value, (tuple, list)) else sizes[0]

    return property(get, _setter(name))


def _cache_property(name: str) -> property:
    """Give a sub-network a dictionary of its own; each setting of a width is a new `Width`, which none other finds."""

    def get(self: SlimModule) -> dict:
        width = self._state.width
        if width.multiplier >= 1:
            return self._full[name]
        if name not in self._subnet_caches or self._subnet_caches[name][0] is not width:
            self._subnet_caches[name] = width, {}
        return self._subnet_caches[name][1]

    def set_value(self: SlimModule, value: dict) -> None:
        self._subnet_caches.pop(name, None)
        self.__dict__[name] = self._full[name] = value

    return property(get, set_value)


def _override_property(name: str) -> property:
    return property(lambda self: (self._overrides if name in self._overrides else self._full)[name], _setter(name))


def _tracking_property() -> property:
    """Have a training sub-network use batch statistics and write none, unless its own are being measured."""

    def get(self: SlimModule) -> bool:
        if self._overrides or not (self.training and self._state.is_subnet):
            return self._full["track_running_stats"]
        return False

    return property(get, _setter("track_running_stats"))


def _setter(name: str) -> Callable[[SlimModule, Any], None]:
    def set_value(self: SlimModule, value: Any) -> None:
        # `_full` is missing in the constructor, which adapters call for a layer of the same class.
        self.__dict__[name] = self.__dict__.setdefault("_full", {})[name] = value

    return set_value


def patch(
    network: nn.Module, slices: Mapping[str, Slices], shortcuts: Mapping[str, Shortcut], state: WidthState
) -> None:
    """Make modules slimmable and residual blocks droppable in place.

    Args:
        network: the model, unpatched; gets an attribute `_width_state`.
        slices: module name -> its slices. Every batch norm is patched, sliced or not.
        shortcuts: block name -> its shortcut.
        state: the width and the dropped blocks that they share.
    """
    state.own_buffers = []
    for name, module in network.named_modules():
        if name not in slices and name not in shortcuts and not isinstance(module, _BatchNorm):
            continue
        own = slices.get(name) or Slices()
        kind = _kind(module, name in shortcuts)
        names = (tuple(sorted(each)) for each in (own.tensors, own.attributes, own.caches, own.written))
        module.__class__ = _slim_class(kind, type(module), *names)
        module._slices, module._state, module._overrides = own, state, {}
        # What properties read: in older versions of torch, compiled code takes `self.__dict__[name]` for `self.name`.
        module._full = {name: vars(module)[name] for name in vars(module) if name in vars(type(module))}
        module._cuts = {name: Cut.of(patterns) for name, patterns in own.tensors.items()}
        module._subnet_caches, module._subnet_buffers = {}, {}
        if own.written:
            state.own_buffers.append(module._subnet_buffers)
        if name in shortcuts:
            module._shortcut = shortcuts[name]
    state.num_blocks = len(shortcuts)
    mark(network, state)
    state.guard = BufferGuard.of(network)
    network._width_state = state


def slices_of(network: nn.Module) -> dict[str, Slices]:
    """Return the slices of each patched module of a model, by its name."""
    return {name: module._slices for name, module in network.named_modules() if isinstance(module, SlimModule)}


def shortcuts_of(network: nn.Module) -> dict[str, Shortcut]:
    """Return the shortcut of each droppable block of a model, by its name."""
    return {name: module._shortcut for name, module in network.named_modules() if isinstance(module, DroppableBlock)}


def unpatch(model: nn.Module) -> nn.Module:
    """Give the layers of a slimmable or droppable model their own classes back, in place.

    Parameters, buffers and outputs of the full model stay as they are. Tools that go by the class of a layer
    (`torch.jit.script`, dynamic quantisation) need the plain classes.

    Args:
        model: any module; one that was not patched is left as it is.

    Returns:
        The same model.

    Examples:
        >>> type(unpatch(make_slimmable(model)).bn1)
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    for module in model.modules():
        _unpatch_module(module)
        for name in MODEL_ATTRIBUTES:
            vars(module).pop(name, None)
    return model


def _unpatch_module(module: nn.Module) -> None:
    unmark(module)
    if isinstance(module, SlimModule):
        module.__class__ = type(module)._unsliced
        for name in SlimModule.__annotations__ | DroppableBlock.__annotations__:
            vars(module).pop(name, None)
