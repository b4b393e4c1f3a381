"""Run a model once on the meta device and find out which channels are tied.

Every dimension of every tensor carries an axis (`axes.py`). The dimensions of parameters and buffers start as free
units; the handler of each ATen operation (`handlers.py`) ties, splits and joins them. What reaches an operation
without a handler, the image, the class outputs or a tensor of unknown origin stays whole, with a reason.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gradaug_hf.slimming.analysis.axes import Axis, Unit, axis_of, axis_size, fix, fixed, resolve, tie
from gradaug_hf.slimming.meta import meta_copy
from gradaug_hf.utils.attributes import replaced

Axes = tuple[Axis, ...]

# Handlers that a user registers for layer classes of their own, whose forward is then not looked into.
LayerHandler = Callable[..., None]
LAYER_HANDLERS: dict[type[nn.Module], LayerHandler] = {}

# Names under which modules keep the sizes that they view, split and slice tensors by.
SIZE_NAME = re.compile(
    "shape|head|dim|chan|chs|feat|plane|hidden|inner|embed|group|split|indices|size|width|key|value|nh|dh"
)


# Whether a reshape copies depends on the sizes; what only passes a tensor on is followed but not remembered.
COPIES = ("clone", "contiguous", "alias", "detach", "lift_fresh", "_to_copy")


def operation_name(func: torch._ops.OpOverload) -> str:
    """Return the name of an operation; a view is a view, whether of a copy or not."""
    return str(func.overloadpacket).removeprefix("aten.").replace("_unsafe_view", "view")


@dataclass(eq=False)
class Call:
    """Record one ATen operation, or one layer with a handler: arguments, result, and the calling module."""

    func: torch._ops.OpOverload | None
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module_name: str
    module: nn.Module
    constants: list[Any]
    in_axes: list[Axes] = field(default_factory=list)
    out_axes: list[Axes] = field(default_factory=list)

    @property
    def reason(self) -> str:
        return f"{self.name} in {self.module_name or 'the model'}"

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def tensors(self) -> list[torch.Tensor]:
        return tensors_in((self.args, self.kwargs))

    def axes(self) -> list[Axis]:
        return [axis for axes in (*self.in_axes, *self.out_axes) for axis in axes]


@dataclass
class Product:
    """Count the multiply-adds of one operation on the whole batch: the product of the sizes of its axes."""

    module_name: str
    axes: list[Axis]


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return all tensors of nested lists, tuples, mappings and model outputs."""
    if isinstance(tree, Mapping):
        return [tensor for value in tree.values() for tensor in tensors_in(value)]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def register_layer(cls: type[nn.Module]) -> Callable[[LayerHandler], LayerHandler]:
    """Register the decorated function as the handler of a layer class, for layers that the tracer cannot follow.

    The handler is called as `handler(trace, layer, *inputs, output)` each time the layer ran on the meta device.
    `trace.axes(tensor)` gives an axis for each dimension of an input or a parameter; `trace.tie(a, b)` makes two of
    them the same channels, `trace.bind(layer, "name", axis)` says that an attribute holds the size of one, and
    `trace.set_axes(output, axes)` must say what the output is made of. Parameters that are tied to sliced channels are
    narrowed like those of any layer. The sub-network is still proven by running it.

    Args:
        cls: the layer class; its subclasses are handled too, unless they have a handler of their own.

    Raises:
        TypeError: `cls` is not a module class.

    Examples:
        >>> @register_layer(Scale)  # a layer of your own, with a weight for each channel
        ... def scale(trace, layer, images, output):
        ...     trace.tie(trace.axes(layer.weight)[0], trace.axes(images)[1])
        ...     trace.set_axes(output, trace.axes(images))
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_layer takes a subclass of torch.nn.Module, not {cls!r}")

    def register(handler: LayerHandler) -> LayerHandler:
        LAYER_HANDLERS[cls] = handler
        return handler

    return register


def find_layer_handler(module: nn.Module) -> LayerHandler | None:
    return next((LAYER_HANDLERS[cls] for cls in type(module).__mro__ if cls in LAYER_HANDLERS), None)


def watch_layers(network: nn.Module, run: Callable[..., Any]) -> None:
    """Have the layers with a handler run by `run(layer, forward, *args, **kwargs)`."""
    for module in network.modules():
        if find_layer_handler(module) is not None:
            module.forward = partial(run, module, module.forward)


@dataclass
class Run:
    """Hold the calls of one run of the model, in training or evaluation mode."""

    training: bool
    calls: list[Call]


class Trace(TorchDispatchMode):
    """Record the calls of a model on the meta device and the axes of its tensors.

    Args:
        network: a copy of the model on the meta device (`meta_copy`).
        handlers: operation -> handler; a handler takes the trace and a call and sets the axes of the call's result.
        whole: module name -> why everything that goes into and comes out of it, and its own parameters, stay whole.
    """

    def __init__(
        self,
        network: nn.Module,
        handlers: Callable[[torch._ops.OpOverload], Callable[["Trace", Call], None] | None],
        whole: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.network = network
        self.handlers = handlers
        self.whole = whole
        self.runs: list[Run] = []
        self.products: list[Product] = []
        self.attributes: dict[tuple[str, str], list[Axes]] = {}
        self.stored: dict[tuple[str, str], Axes] = {}
        self.written: set[tuple[str, str]] = set()
        self.caches: set[tuple[str, str]] = set()
        self._used: set[tuple[str, str]] = set()
        self._stored_in: dict[int, list[tuple[str, str]]] = {}
        self._axes: dict[int, Axes] = {}
        self._alive: list[torch.Tensor] = []
        self._module_names: dict[int, str] = {}
        self._inside_layer = False
        self._replaced = [name for name, module in network.named_modules() if "forward" in vars(module)]

    def _attach(self, subject: nn.Module) -> None:
        """Give the parameters and buffers of a copy the axes that those of earlier copies have."""
        self._stored_in = {}
        for module_name, module in subject.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                key = module_name, name
                self._stored_in.setdefault(_storage(tensor), []).append(key)
                if id(tensor) not in self._axes:
                    whole = "a table of indices or positions" if _is_table(module, name) else None
                    new = tuple(axis_of(Unit(size, whole)) for size in tensor.shape)
                    if "lora_A" in module_name.split("."):  # so that merging changes no sub-network
                        fix(new[0], "the rank of an adapter")
                    self.set_axes(tensor, self.stored.get(key, new))
                self.stored[key] = self._axes[id(tensor)]

    def axes(self, tensor: torch.Tensor) -> Axes:
        """Return the axes of a tensor, as the ties made so far have them."""
        if id(tensor) not in self._axes:
            self.set_whole(tensor, "meets a tensor that is no parameter")
        return tuple(resolve(axis) for axis in self._axes[id(tensor)])

    def set_axes(self, tensor: torch.Tensor, axes: Axes) -> None:
        self._axes[id(tensor)] = axes
        self._alive.append(tensor)

    def set_whole(self, tensors: Any, reason: str = "") -> None:
        """Give tensors, also those in lists and mappings, axes that are whole."""
        for tensor in tensors_in(tensors):
            self.set_axes(tensor, tuple(fixed(size, reason) for size in tensor.shape))

    def keep_whole(self, tensors: Any, reason: str) -> None:
        """Keep the axes whole that tensors, also those in lists and mappings, have already."""
        for tensor in tensors_in(tensors):
            for axis in self.axes(tensor):
                fix(axis, reason)

    def name_of(self, module: nn.Module) -> str:
        """Return the name of a module of the model that is traced."""
        return self._module_names[id(module)]

    def tie(self, first: Axis, second: Axis) -> None:
        """Make two axes the same channels."""
        tie(first, second, "meets something whole in a layer with a handler of its own")

    def bind(self, module: nn.Module, name: str, *axes: Axis) -> None:
        """Note that an attribute of a module holds the size of an axis (or, a tuple, of several)."""
        sizes = tuple(axis_size(axis) for axis in axes)
        if vars(module).get(name) in (sizes, sizes[0] if len(sizes) == 1 else None):
            self.attributes[self.name_of(module), name] = [axes]

    def bind_sizes(self, call: Call, axes: Sequence[Axis]) -> None:
        """Bind the attributes of the calling module that look like the sizes it cuts a tensor into.

        A guess by name and value, of which there may be several; the proof shows whether it holds.
        """
        sizes = [axis_size(axis) for axis in axes]
        for name, value in vars(call.module).items():
            if not SIZE_NAME.search(name):
                continue
            guesses: list[Axes] = []
            if isinstance(value, (tuple, list)) and list(value) == sizes:
                guesses = [tuple(axes)]
            elif isinstance(value, int) and not isinstance(value, bool):
                guesses = [(axis,) for axis, size in zip(axes, sizes, strict=True) if size == value > 1]
            if guesses:
                self.attributes.setdefault((call.module_name, name), []).extend(guesses)

    def run(self, example: torch.Tensor, training: bool) -> None:
        """Run a copy of the model on an image batch; its outputs are kept whole, its products counted anew.

        Raises:
            Whatever the model raises on the meta device.
        """
        subject = meta_copy(self.network).train(training)
        if training:
            stop_tracking(subject)
        self._attach(subject)
        self.set_whole(example)
        self.products.clear()
        self.runs.append(Run(training, []))
        self._module_names = {id(module): name for name, module in subject.named_modules()}
        watch_layers(subject, self._run_layer)
        for module_name, reason in self.whole.items():
            hook = partial(self._keep_module_whole, reason)
            subject.get_submodule(module_name).register_forward_hook(hook, with_kwargs=True)
        buffers = _buffers_of(subject)
        with self:
            self.keep_whole(subject(example), "the model's output")
        self.caches.update(_filled_dictionaries(subject))
        after = _buffers_of(subject)
        self.written.update(key for key, buffer in buffers.items() if after.get(key) is not buffer)

    def _keep_module_whole(self, reason: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.keep_whole((args, kwargs, output, list(module.parameters(recurse=False))), reason)

    def fix_unused(self) -> None:
        """Keep parameters whole that no operation was seen to use: nothing is known about their channels."""
        for key in self.stored.keys() - self._used:
            for axis in self.stored[key]:
                fix(axis, "no operation of the traced pass uses it")

    @property
    def calls(self) -> Iterator[Call]:
        return (call for run in self.runs for call in run.calls)

    def _calling_module(self) -> tuple[str, nn.Module]:
        """Return the module in whose code the operation is called, in `forward` or another method."""
        frame = sys._getframe(2)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in self._module_names:
                return self._module_names[id(module)], module
            frame = frame.f_back
        return "", self.network

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._check_origin((args, kwargs))
        constants = constants_in(func, args)
        args, kwargs = to_meta(args), to_meta(kwargs or {})
        self._note_use(func, args, kwargs)
        if self._inside_layer:
            return func(*args, **kwargs)
        axes_before = [self.axes(tensor) for tensor in tensors_in((args, kwargs))]
        out = func(*args, **kwargs)
        call = Call(func, operation_name(func), args, kwargs, out, *self._calling_module(), constants)
        handler = self.handlers(func)
        if handler is None:
            refuse(self, call, f"the operation {call.name} is not known")
        else:
            handler(self, call)
        call.in_axes = axes_before
        call.out_axes = [self.axes(tensor) for tensor in tensors_in(out)]
        if call.name not in COPIES:
            self.runs[-1].calls.append(call)
        return out

    def _run_layer(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer that has a handler without looking into it."""
        axes_before = [self.axes(tensor) for tensor in tensors_in((args, kwargs))]
        with replaced(self, _inside_layer=True):
            out = forward(*args, **kwargs)
        name = self.name_of(module)
        call = Call(None, type(module).__name__, args, kwargs, out, name, module, [], axes_before)
        find_layer_handler(module)(self, module, *args, *kwargs.values(), out)
        call.out_axes = [self.axes(tensor) for tensor in tensors_in(out)]
        self.runs[-1].calls.append(call)
        return out

    def _check_origin(self, arguments: Any) -> None:
        """Stop before a forward that was replaced by a function around the model itself does anything to it."""
        if self._replaced and any(isinstance(t, nn.Parameter) and not t.is_meta for t in tensors_in(arguments)):
            raise RuntimeError(
                f"the forward of {self._replaced[0] or 'the model'} was replaced by a function that runs the model "
                "itself; replace it by a method, types.MethodType(function, module)"
            )

    def _note_use(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember which stored tensors an operation uses, and which of them it writes to, also by a view."""
        for tensor in tensors_in((args, kwargs)):
            self._used.update(self._stored_in.get(_storage(tensor), ()))
        for tensor in written_tensors(func, args, kwargs):
            self.written.update(self._stored_in.get(_storage(tensor), ()))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def written_tensors(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an operation writes to."""
    arguments = {argument.name: argument for argument in func._schema.arguments}
    named = {**dict(zip(arguments, args, strict=False)), **kwargs}
    written = {name for name, argument in arguments.items() if argument.alias_info and argument.alias_info.is_write}
    if func.overloadpacket is torch.ops.aten.native_batch_norm and named["training"]:
        written = {"running_mean", "running_var"}  # which its schema does not say
    return tensors_in([named[name] for name in written if name in named])


def stop_tracking(network: nn.Module) -> None:
    """Have batch norms leave their statistics alone while training, as those of a sub-network do."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False


def _is_table(module: nn.Module, name: str) -> bool:
    """Return True for a buffer of indices or positions, but not for the mask of a pruned parameter."""
    buffer = module._buffers.get(name)
    pruned = f"{name.removesuffix('_mask')}_orig" in module._parameters
    return buffer is not None and not pruned and (buffer.ndim > 1 or not buffer.is_floating_point())


def _buffers_of(network: nn.Module) -> dict[tuple[str, str], torch.Tensor | None]:
    return {
        (module_name, name): buffer
        for module_name, module in network.named_modules()
        for name, buffer in module._buffers.items()
    }


def _filled_dictionaries(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (module name, attribute) of the dictionaries, other than PyTorch's own, that hold tensors."""
    inherited = vars(nn.Module())
    for module_name, module in network.named_modules():
        for name, value in vars(module).items():
            values = value.values() if isinstance(value, dict) and name not in inherited else ()
            if any(isinstance(each, torch.Tensor) for each in values):
                yield module_name, name


def constants_in(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> list[Any]:
    """Return the numbers that a pointwise operation is given (a softmax scale); they must not depend on the width."""
    if torch.Tag.pointwise not in func.tags:
        return []
    values = (arg.item() if isinstance(arg, torch.Tensor) and not (arg.is_meta or arg.ndim) else arg for arg in args)
    return [value for value in values if isinstance(value, (int, float))]


def refuse(trace: Trace, call: Call, reason: str) -> None:
    """Keep everything whole that goes into and comes out of a call."""
    trace.keep_whole(call.tensors(), reason)
    trace.set_whole(call.out, reason)


def to_meta(tree: Any) -> Any:
    """Move stray tensors (constants made on the CPU in forward) to the meta device."""
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, tree)
