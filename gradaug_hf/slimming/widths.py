"""Set the width of a slimmable model, and refuse one that was changed since it was patched."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from gradaug_hf.slimming.changes import find_change, mark
from gradaug_hf.slimming.patching import WidthState
from gradaug_hf.slimming.patterns import Width


def width_state(model: nn.Module) -> WidthState:
    """Return the width state of a slimmable model, also inside a wrapper such as DDP.

    Raises:
        ValueError: `make_slimmable` was not called on the model, or the model was changed since.
    """
    patched = _patched_model(model)
    if patched is None or "_slicing_report" not in vars(patched):
        raise ValueError(f"{type(model).__name__} is not slimmable: call gradaug_hf.make_slimmable(model) first")
    check_unchanged(patched)
    return patched._width_state


def check_unchanged(model: nn.Module) -> None:
    """Raise a ValueError if a model was changed after it was made slimmable or droppable."""
    patched = _patched_model(model)
    if patched is not None and (change := _change_of(patched)) is not None:
        function = "make_slimmable" if "_slicing_report" in vars(patched) else "slimming.depth.make_droppable"
        raise ValueError(
            f"{type(patched).__name__} was changed after gradaug_hf.{function}(model): {change}; call it again"
        )


def accept_wrappers(model: nn.Module) -> None:
    """Treat a model as unchanged although modules of it were wrapped in others, which compute the same."""
    patched = _patched_model(model)
    if patched is not None:
        mark(patched, patched._width_state)


def is_slimmable(model: nn.Module) -> bool:
    """Return True if `make_slimmable` was called on a model, or on what it wraps, as the model is now."""
    patched = _patched_model(model)
    return patched is not None and "_slicing_report" in vars(patched) and _change_of(patched) is None


def num_droppable_blocks(model: nn.Module) -> int:
    """Return how many residual blocks of a model can be dropped: 0 unless `make_droppable` was called on it."""
    patched = _patched_model(model)
    return 0 if patched is None or _change_of(patched) is not None else patched._width_state.num_blocks


def _patched_model(model: nn.Module) -> nn.Module | None:
    return next((module for module in model.modules() if "_width_state" in vars(module)), None)


def _change_of(patched: nn.Module) -> str | None:
    return find_change(patched, patched._width_state)


def check_width(width: float) -> float:
    if not 0 < width <= 1:
        raise ValueError(f"width is {width!r}; a width multiplier lies in (0, 1]")
    return float(width)


def set_width(model: nn.Module, width: float) -> None:
    """Set the width multiplier of a slimmable model.

    Args:
        model: a model that `make_slimmable` was called on, or a wrapper of one.
        width: width multiplier in (0, 1]; 1 is the full model.

    Raises:
        ValueError: the width is out of range, or the model is not slimmable or was changed since.

    Examples:
        >>> set_width(make_slimmable(model), 0.5)
        >>> logits = model(images)
    """
    state = width_state(model)
    state.set(Width(check_width(width), state.width.divisor), state.subnet_pass, state.dropped)


@contextmanager
def at_width(model: nn.Module, width: float) -> Iterator[nn.Module]:
    """Use a slimmable model at a width multiplier; the width it had comes back, also after an exception.

    Args:
        model: a model that `make_slimmable` was called on, or a wrapper of one.
        width: width multiplier in (0, 1].

    Raises:
        ValueError: the width is out of range, or the model is not slimmable or was changed since.

    Examples:
        >>> with at_width(make_slimmable(model), 0.5):
        ...     logits = model(images)
    """
    with width_state(model).kept():
        set_width(model, width)
        yield model


@contextmanager
def subnet_pass(
    model: nn.Module, width: float, dropped: Collection[int] = (), direct: bool = False
) -> Iterator[nn.Module]:
    """Use a model at a width multiplier for the training pass of a sub-network: no buffer is written, also at width 1.

    Args:
        model: a model that `make_slimmable` was called on, or a wrapper of one; one that `make_droppable` was
            called on does as well at width 1.
        width: width multiplier in (0, 1].
        dropped: indices of the residual blocks that are replaced by their shortcuts.
        direct: whether the backward adds the gradients of slices to `grad` of the parameters in place, which is
            quicker. Nothing else may wait for them, as the hooks of `DistributedDataParallel` do; those of a parameter
            itself are heeded.

    Raises:
        ValueError: the width is out of range, or the model is not slimmable or was changed since.
    """
    patched = _patched_model(model)
    if patched is not None and width == 1 and patched._width_state.num_blocks:
        check_unchanged(patched)
        state = patched._width_state
    else:
        state = width_state(model)
    with state.kept(), state.guard.restored():
        state.set(Width(check_width(width), state.width.divisor), True, dropped, direct)
        yield model
