"""Find what was changed in a model after it was patched, so that no sub-network runs by a plan that no longer holds.

Every module of a patched model carries a mark. One that was put in later (a new classifier, an adapter, a frozen norm)
has none, and so has one that went back to its own class (pruned, parametrized).
"""

from typing import Any, NamedTuple

import torch
from torch import nn

MARK = "_patched_with"


class Mark(NamedTuple):
    """Hold the state that a model was patched with, the shapes of a module's sliced tensors, and its children."""

    state: Any
    shapes: dict[str, torch.Size]
    children: tuple[nn.Module | None, ...]


def mark(model: nn.Module, state: Any) -> None:
    """Mark every module of a patched model with the state that they share."""
    for module in model.modules():
        slices = vars(module).get("_slices")
        names = () if slices is None else slices.tensors
        shapes = {name: _stored(module, name).shape for name in names}
        vars(module)[MARK] = Mark(state, shapes, tuple(module._modules.values()))


def unmark(module: nn.Module) -> None:
    """Take the mark off a single module."""
    vars(module).pop(MARK, None)


def find_change(model: nn.Module, state: Any) -> str | None:
    """Return what is no longer as it was when a model was marked, or None."""
    if _is_as_marked(model, state):
        return None
    for name, module in model.named_modules():
        if not _is_marked(module, state):
            return f"{name or 'the model'} ({type(module).__name__}) was put in or changed"
        if not _has_planned_shapes(module):
            return f"{name or 'the model'} ({type(module).__name__}) has parameters of another shape"
    return "a module was taken out or moved"


def _is_as_marked(model: nn.Module, state: Any) -> bool:
    """Return whether all modules are as marked; each pass asks, so it goes by the marks rather than `modules()`."""
    pending = [model]
    while pending:
        module = pending.pop()
        if not (_is_marked(module, state) and _has_planned_shapes(module)):
            return False
        children = vars(module)[MARK].children
        if children != tuple(module._modules.values()):
            return False
        pending.extend(child for child in children if child is not None)
    return True


def _is_marked(module: nn.Module, state: Any) -> bool:
    own = vars(module).get(MARK)
    return own is not None and own.state is state


def _has_planned_shapes(module: nn.Module) -> bool:
    shapes = vars(module)[MARK].shapes
    return not shapes or all(_stored(module, name).shape == shape for name, shape in shapes.items())


def _stored(module: nn.Module, name: str) -> torch.Tensor:
    return module._parameters[name] if name in module._parameters else module._buffers[name]
