"""Prove a plan by running the sub-network: every operation must give the sizes that the axes foretell.

Where one does not, the plan is mended. Code that takes one size for another (`x.reshape(B, N, C)` after attention,
with the C of its input) ties the two; otherwise the units that do not follow stay whole. Both are done in all modules
of the class at once, so that repeated blocks are mended together.
"""

from collections.abc import Callable, Iterator
from itertools import combinations, takewhile
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradaug_hf.slimming.analysis.axes import Axis, Unit, axis_size, fix, product, tie
from gradaug_hf.slimming.analysis.planning import Plan
from gradaug_hf.slimming.analysis.tracing import (
    COPIES,
    Axes,
    Call,
    Run,
    constants_in,
    operation_name,
    stop_tracking,
    tensors_in,
    to_meta,
    watch_layers,
)
from gradaug_hf.slimming.extraction import narrow
from gradaug_hf.slimming.meta import meta_copy
from gradaug_hf.slimming.patterns import Width, pattern_size
from gradaug_hf.utils.attributes import replaced

# Widths at which sizes that only happen to agree (half of twelve heads and half of their channels) do not.
PROOF_WIDTHS = {True: Width(0.69), False: Width(0.53)}


class Deviation(Exception):
    """Raised where the sub-network does not do what the plan foretells: at a position among the calls of a run."""

    def __init__(self, run: int, position: int, message: str) -> None:
        super().__init__(message)
        self.place = run, position


class Slot(NamedTuple):
    """Name a dimension of an argument or a result of a call."""

    is_result: bool
    tensor: int
    dims: slice


class _Check(TorchDispatchMode):
    def __init__(self, plan: Plan, index: int) -> None:
        super().__init__()
        self.plan = plan
        self.index = index
        self.calls = plan.trace.runs[index].calls
        self.width = PROOF_WIDTHS[plan.trace.runs[index].training]
        self.position = 0
        self.inside_layer = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*to_meta(args), **to_meta(kwargs or {}))
        name = operation_name(func)
        if name not in COPIES and not self.inside_layer:
            self.compare(name, constants_in(func, args), out)
        return out

    def run_layer(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer that has a handler; only its output is compared."""
        with replaced(self, inside_layer=True):
            out = forward(*args, **kwargs)
        self.compare(type(module).__name__, [], out)
        return out

    def compare(self, name: str, constants: list[Any], out: Any) -> None:
        call = self.calls[self.position] if self.position < len(self.calls) else None
        if call is None or call.name != name:
            raise self.deviation(f"another path is taken: {name} instead of {call.reason if call else 'the end'}")
        if constants != call.constants:
            raise self.deviation(f"a constant of {call.reason} changes with the width")
        for tensor, axes in zip(tensors_in(out), call.out_axes, strict=True):
            expected = tuple(pattern_size(self.plan.pattern(axis), self.width) for axis in axes)
            if tuple(tensor.shape) != expected:
                raise self.deviation(f"{call.reason} gives {tuple(tensor.shape)} where {expected} follows the width")
        self.position += 1

    def deviation(self, message: str) -> Deviation:
        return Deviation(self.index, min(self.position, len(self.calls) - 1), message)


def find_deviation(plan: Plan, example: torch.Tensor) -> Deviation | None:
    """Return the first operation of the sub-network, in training or evaluation mode, that does not follow the plan."""
    slices = plan.slices()
    for index, run in enumerate(plan.trace.runs):
        subnet = meta_copy(plan.trace.network).train(run.training)
        if run.training:
            stop_tracking(subnet)
        narrow(subnet, slices, PROOF_WIDTHS[run.training])
        check = _Check(plan, index)
        watch_layers(subnet, check.run_layer)
        try:
            with check:
                subnet(example)
        except Deviation as deviation:
            return deviation
        except Exception as error:  # whatever a model raises at a width it was not written for
            return check.deviation(str(error).split("\n")[0])
    return None


def prove(plan: Plan, example: torch.Tensor) -> None:
    """Mend a plan until the sub-network runs as foretold.

    Raises:
        RuntimeError: the model does not even repeat itself at full width.
    """
    while (deviation := find_deviation(plan, example)) is not None:
        if _tie_sizes(plan, example, deviation):
            continue
        suspects = _suspects(plan, deviation)
        if not suspects:
            raise RuntimeError(f"the full model does not repeat what it did: {deviation}") from deviation
        _hold(plan, _guilty(plan, example, deviation, suspects), deviation)


def _tie_sizes(plan: Plan, example: torch.Tensor, deviation: Deviation) -> bool:
    """Try to tie what the code at a deviation takes for the same size; tell whether its module then runs."""
    run, call = _at(plan, deviation)
    if call.name not in ("view", "expand"):
        return False
    for first, earlier, second in _same_sizes(plan, run, call):
        before = plan.snapshot()
        for other, partner in _siblings(run, call, call, earlier):
            if _size(other, first) == _size(partner, second):
                reason = f"its size is taken for another's by {other.reason}"
                tie(_axis(other, first), _axis(partner, second), reason)
        plan.refresh()
        found = find_deviation(plan, example)
        if found is None or (found.place > deviation.place and _at(plan, found)[1].module_name != call.module_name):
            return True
        plan.restore(before)
    return False


def _same_sizes(plan: Plan, run: Run, call: Call) -> Iterator[tuple[Slot, Call, Slot]]:
    """Yield dimensions of a view, or neighbouring ones together, with the size of one met earlier in its module."""
    before = takewhile(lambda other: other is not call, run.calls)
    earlier = [other for other in before if f"{other.module_name}.".startswith(f"{call.module_name}.")]
    tried = set()
    for first in _slots(call.out_axes, is_result=True):
        for other in earlier:
            for second in _single_slots(other):
                if _size(call, first) != _size(other, second):
                    continue
                a, b = _axis(call, first), _axis(other, second)
                if a != b and (a, b) not in tried and plan.sliced_units([a]) and plan.sliced_units([b]):
                    tried.add((a, b))
                    yield first, other, second


def _slots(each: list[Axes], is_result: bool, longest: int | None = None) -> Iterator[Slot]:
    """Yield the dimensions of some tensors, and runs of neighbouring ones up to a length."""
    for tensor, axes in enumerate(each):
        for start, stop in combinations(range(len(axes) + 1), 2):
            if longest is None or stop - start <= longest:
                yield Slot(is_result, tensor, slice(start, stop))


def _axes(call: Call, slot: Slot) -> Axes:
    each = call.out_axes if slot.is_result else call.in_axes
    return each[slot.tensor][slot.dims] if slot.tensor < len(each) else ()


def _size(call: Call, slot: Slot) -> int:
    return prod(axis_size(axis) for axis in _axes(call, slot))


def _axis(call: Call, slot: Slot) -> Axis:
    return product(_axes(call, slot))


def _at(plan: Plan, deviation: Deviation) -> tuple[Run, Call]:
    index, position = deviation.place
    run = plan.trace.runs[index]
    return run, run.calls[position]


def _siblings(run: Run, within: Call, *calls: Call) -> Iterator[tuple[Call, ...]]:
    """Yield calls of a module, and those at the same places of the forward of every module of its class."""
    below = _below(run, within.module_name)
    places = [below.index(call) for call in calls]
    kinds = [call.name for call in calls]
    for name in dict.fromkeys(call.module_name for call in run.calls if type(call.module) is type(within.module)):
        below = _below(run, name)
        if max(places) < len(below) and [below[place].name for place in places] == kinds:
            yield tuple(below[place] for place in places)


def _below(run: Run, module_name: str) -> list[Call]:
    prefix = f"{module_name}." if module_name else ""
    return [call for call in run.calls if f"{call.module_name}.".startswith(prefix)]


def _suspects(plan: Plan, deviation: Deviation) -> list[Unit]:
    """Return the sliced units at the call that went wrong and before it in its module, or at the nearest call."""
    run, wrong = _at(plan, deviation)
    before = list(reversed(run.calls[: deviation.place[1] + 1]))
    in_module = [call for call in before if call.module_name == wrong.module_name]
    places = (in_module, *([call] for call in before), plan.trace.calls)
    found = (plan.sliced_units(axis for call in calls for axis in call.axes()) for calls in places)
    return next(filter(None, found), [])


def _guilty(plan: Plan, example: torch.Tensor, deviation: Deviation, suspects: list[Unit]) -> list[Unit]:
    """Return the one suspect without which the model gets further, or all of them."""
    for unit in suspects if len(suspects) > 1 else []:
        plan.held = {unit}
        found = find_deviation(plan, example)
        plan.held = set()
        if found is None or found.place > deviation.place:
            return [unit]
    return suspects


def _hold(plan: Plan, guilty: list[Unit], deviation: Deviation) -> None:
    """Keep the guilty units whole, and those at the same places in other modules of the class."""
    run, wrong = _at(plan, deviation)
    reason = f"a narrower model does not run: {deviation}"
    places = [(call, slot) for call in _below(run, wrong.module_name) for slot in _single_slots(call)]
    places = [(call, slot) for call, slot in places if plan.sliced_units(_axes(call, slot)) in ([u] for u in guilty)]
    for call, slot in places:
        for (other,) in _siblings(run, wrong, call):
            if _size(other, slot) == _size(call, slot):
                fix(_axis(other, slot), reason)
    for unit in guilty:
        unit.reason = unit.reason or reason
    plan.refresh()


def _single_slots(call: Call) -> list[Slot]:
    return [*_slots(call.in_axes, False, longest=1), *_slots(call.out_axes, True, longest=1)]
