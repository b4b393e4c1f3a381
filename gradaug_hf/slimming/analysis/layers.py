"""Handlers that a user registers for layer classes of their own, whose forward is then not looked into."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from gradaug_hf.slimming.analysis.tracing import Trace

LayerHandler = Callable[..., None]
LAYER_HANDLERS: dict[type[nn.Module], LayerHandler] = {}


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
            module.forward = _watched(module, module.forward, run)


def _watched(module: nn.Module, forward: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: run(module, forward, *args, **kwargs)


def tie_layer(trace: "Trace", module: nn.Module, inputs: list[Any], output: Any) -> None:
    """Call the handler of a layer that has run."""
    handler = find_layer_handler(module)
    handler(trace, module, *inputs, output)
