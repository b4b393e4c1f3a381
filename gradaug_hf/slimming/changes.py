"""Find what was changed in a model after it was patched, so that no sub-network runs by a plan that no longer holds.

Every module of a patched model carries a mark. One that was put in later (a new classifier, an adapter, a frozen norm)
has none, and so has one that went back to its own class (pruned, parametrized).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

MARK = "_patched_with"


class Mark(NamedTuple):
    """Hold the state that a model was patched with, and the shapes of the sliced tensors of one of its modules."""

    state: Any
    shapes: dict[str, torch.Size]


def mark(model: nn.Module, state: Any) -> int:
    """Mark every module of a patched model with the state that they share, and return their number."""
    modules = list(_walk(model))
    for module in modules:
        slices = vars(module).get("_slices")
        names = () if slices is None else slices.tensors
        vars(module)[MARK] = Mark(state, {name: _stored(module, name).shape for name in names})
    return len(modules)


def unmark(module: nn.Module) -> None:
    """Take the mark off a single module."""
    vars(module).pop(MARK, None)


def find_change(model: nn.Module, state: Any, num_modules: int) -> str | None:
    """Return what is no longer as it was when a model was marked, or None."""
    modules = list(_walk(model))
    if len(modules) == num_modules and all(_is_as_marked(module, state) for module in modules):
        return None
    for name, module in model.named_modules():
        if not _is_marked(module, state):
            return f"{name or 'the model'} ({type(module).__name__}) was put in or changed"
        if not _has_planned_shapes(module):
            return f"{name or 'the model'} ({type(module).__name__}) has parameters of another shape"
    return "a module was taken out"


def _walk(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module as often as it is registered; quicker than `Module.modules`, as each pass does it."""
    pending = [model]
    while pending:
        module = pending.pop()
        yield module
        pending.extend(child for child in module._modules.values() if child is not None)


def _is_as_marked(module: nn.Module, state: Any) -> bool:
    return _is_marked(module, state) and _has_planned_shapes(module)


def _is_marked(module: nn.Module, state: Any) -> bool:
    own = vars(module).get(MARK)
    return own is not None and own.state is state


def _has_planned_shapes(module: nn.Module) -> bool:
    return all(_stored(module, name).shape == shape for name, shape in vars(module)[MARK].shapes.items())


def _stored(module: nn.Module, name: str) -> torch.Tensor:
    return module._parameters[name] if name in module._parameters else module._buffers[name]
