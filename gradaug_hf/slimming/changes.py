"""Find what was changed in a model after it was patched, so that no sub-network runs by a plan that no longer holds.

Every module of a patched model carries a mark. One that was put in later (a new classifier, an adapter, a frozen norm)
has none, and so has one that went back to its own class (pruned, parametrized).
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from gradaug_hf.slimming.patterns import pattern_full_size

MARK = "_patched_with"


def mark(model: nn.Module, state: Any) -> int:
    """Mark every module of a model with the state that they share, and return their number."""
    modules = list(_walk(model))
    for module in modules:
        vars(module)[MARK] = state
    return len(modules)


def unmark(module: nn.Module) -> None:
    """Take the mark off a single module."""
    vars(module).pop(MARK, None)


def find_change(model: nn.Module, state: Any, num_modules: int) -> str | None:
    """Return what is no longer as it was when a model was marked, or None.

    Args:
        model: the module that was marked.
        state: the state that it was marked with.
        num_modules: the number of modules that were marked.
    """
    modules = list(_walk(model))
    if len(modules) == num_modules and all(_is_as_marked(module, state) for module in modules):
        return None
    for name, module in model.named_modules():
        if vars(module).get(MARK) is not state:
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
    return vars(module).get(MARK) is state and _has_planned_shapes(module)


def _has_planned_shapes(module: nn.Module) -> bool:
    slices = vars(module).get("_slices")
    return slices is None or all(
        tuple(map(pattern_full_size, patterns)) == tuple(_stored(module, name).shape)
        for name, patterns in slices.tensors.items()
    )


def _stored(module: nn.Module, name: str) -> Any:
    return module._parameters[name] if name in module._parameters else module._buffers[name]
