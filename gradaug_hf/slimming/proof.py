"""Proves a plan by running the sub-network: every operation must give the sizes that the axes foretell."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradaug_hf.slimming.axes import Unit
from gradaug_hf.slimming.extraction import narrow
from gradaug_hf.slimming.meta import meta_copy
from gradaug_hf.slimming.patterns import Width, pattern_size
from gradaug_hf.slimming.planning import Plan
from gradaug_hf.slimming.tracing import Call, constants_in, tensors_in, to_meta

# Half the channels: unlike one channel, which would broadcast, it shows every size that does not follow.
PROOF_WIDTH = Width(0.5)


class Deviation(Exception):
    """The sub-network does not do what the plan foretells.

    Args:
        position: index of the call at which it shows.
        message: what is wrong there.
    """

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


class _Check(TorchDispatchMode):
    def __init__(self, plan: Plan, calls: list[Call]) -> None:
        super().__init__()
        self.plan = plan
        self.calls = calls
        self.position = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*to_meta(args), **to_meta(kwargs or {}))
        call = self.calls[self.position] if self.position < len(self.calls) else None
        if call is None or call.func is not func:
            raise Deviation(min(self.position, len(self.calls) - 1), "a narrower network takes another path")
        if constants_in(func, args) != call.constants:
            raise Deviation(self.position, f"a constant of {call.reason} changes with the width")
        for tensor, axes in zip(tensors_in(out), call.out_axes, strict=True):
            expected = tuple(pattern_size(self.plan.pattern(axis), PROOF_WIDTH) for axis in axes)
            if tuple(tensor.shape) != expected:
                raise Deviation(
                    self.position, f"{call.reason} gives {tuple(tensor.shape)} where {expected} would follow the width"
                )
        self.position += 1
        return out


def find_deviation(plan: Plan, network: nn.Module, runs: list[tuple[bool, list[Call]]], example: torch.Tensor) -> Any:
    """Run the sub-network of a plan on the meta device.

    Args:
        plan: the plan to prove.
        network: the traced network on the meta device.
        runs: (training mode, the calls traced in it).
        example: the input of the trace.

    Returns:
        None, or (index of the run, `Deviation`) of the first operation that does not follow.
    """
    subnet = meta_copy(network)
    narrow(subnet, plan.slices(), PROOF_WIDTH)
    for index, (training, calls) in enumerate(runs):
        check = _Check(plan, calls)
        try:
            with check:
                subnet.train(training)(example)
        except Deviation as deviation:
            return index, deviation
        except Exception as error:  # whatever a network raises at a width it was not written for
            return index, Deviation(min(check.position, len(calls) - 1), str(error).split("\n")[0])
    return None


def prove(plan: Plan, network: nn.Module, runs: list[tuple[bool, list[Call]]], example: torch.Tensor) -> None:
    """Keep units whole until the sub-network runs as foretold."""
    while (found := find_deviation(plan, network, runs, example)) is not None:
        run, deviation = found
        calls = runs[run][1]
        suspects = _suspects(plan, calls, deviation.position)
        if not suspects:
            raise RuntimeError(f"the full network itself does not run as it was traced: {deviation}") from deviation
        guilty = _guilty(plan, network, runs, example, (run, deviation.position), suspects)
        for unit in guilty:
            unit.reason = f"a narrower network does not run: {deviation}"


def _suspects(plan: Plan, calls: list[Call], position: int) -> list[Unit]:
    """The free units at the call that went wrong, or at the nearest one before it."""
    for call in reversed(calls[: position + 1]):
        units = plan.free_units(axis for axes in (*call.in_axes, *call.out_axes) for axis in axes)
        if units:
            return units
    return plan.free_units(axis for call in calls for axes in call.out_axes for axis in axes)


def _guilty(
    plan: Plan,
    network: nn.Module,
    runs: list[tuple[bool, list[Call]]],
    example: torch.Tensor,
    place: tuple[int, int],
    suspects: list[Unit],
) -> list[Unit]:
    """The one suspect without which the network gets further, or all of them."""
    for unit in suspects if len(suspects) > 1 else []:
        plan.held = {unit}
        found = find_deviation(plan, network, runs, example)
        plan.held = set()
        if found is None or (found[0], found[1].position) > place:
            return [unit]
    return suspects
