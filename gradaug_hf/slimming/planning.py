"""From traced axes to what each module slices."""

from collections.abc import Iterable
from math import gcd, prod

from gradaug_hf.slimming.axes import Axis, Segment, Unit, free_units, iter_units, resolve
from gradaug_hf.slimming.patching import Slices
from gradaug_hf.slimming.patterns import Kept, Pattern, Whole, is_sliced
from gradaug_hf.slimming.tracing import Trace


class Plan:
    """The patterns of a trace. A unit is sliced while it is free and not held whole on trial.

    Args:
        trace: a network's finished trace.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.held: set[Unit] = set()
        _keep_one_unit_a_segment(self._all_axes())
        self._granules = _granules(axis for tensor in trace.stored.values() for axis in trace.axes(tensor))

    def _all_axes(self) -> Iterable[Axis]:
        for tensor in self.trace.stored.values():
            yield from self.trace.axes(tensor)
        for call in self.trace.calls:
            for axes in (*call.in_axes, *call.out_axes):
                yield from axes

    def free_units(self, axes: Iterable[Axis]) -> list[Unit]:
        return [unit for unit in free_units(axes) if unit not in self.held]

    def pattern(self, axis: Axis) -> Pattern:
        parts: list[Kept | Whole] = []
        for segment in resolve(axis):
            part = self._part(segment)
            if parts and isinstance(part, Whole) and isinstance(parts[-1], Whole):
                part = Whole(parts.pop().full_size + part.full_size)
            parts.append(part)
        return tuple(parts)

    def _part(self, segment: Segment) -> Kept | Whole:
        sizes = [unit.size for unit in segment]
        for place, unit in enumerate(segment):
            if unit.free and unit not in self.held:
                granule = self._granules.get(unit, 1)
                return Kept(prod(sizes[:place]), unit.size, prod(sizes[place + 1 :]), granule)
        return Whole(prod(sizes))

    def patterns(self, axes: Iterable[Axis]) -> tuple[Pattern, ...]:
        return tuple(self.pattern(axis) for axis in axes)

    def slices(self) -> dict[str, Slices]:
        """Module name -> what of it is sliced."""
        plan: dict[str, Slices] = {}
        for (module, name), tensor in self.trace.stored.items():
            patterns = self.patterns(self.trace.axes(tensor))
            if any(map(is_sliced, patterns)):
                plan.setdefault(module, Slices()).tensors[name] = patterns
        for (module, name), axes in self.trace.attributes.items():
            patterns = self.patterns(axes)
            if any(map(is_sliced, patterns)):
                plan.setdefault(module, Slices()).attributes[name] = patterns
        for module, name in sorted(self.trace.written):
            own = plan.get(module, Slices())
            plan[module] = Slices(own.tensors, own.attributes, own.written | {name})
        return plan


def _keep_one_unit_a_segment(axes: Iterable[Axis]) -> None:
    """Of units that are multiplied (heads and head size) the outermost is sliced."""
    for axis in axes:
        for segment in resolve(axis):
            free = [unit for unit in segment if unit.free]
            for unit in free[1:]:
                unit.reason = "inside a larger unit that is sliced as a whole"


def _granules(axes: Iterable[Axis]) -> dict[Unit, int]:
    """Unit -> positions by which every dimension that holds it grows with one more channel."""
    granules: dict[Unit, int] = {}
    for axis in axes:
        for segment in axis:
            for unit in iter_units([(segment,)]):
                if unit.free:
                    positions = prod(other.size for other in segment) // unit.size
                    granules[unit] = gcd(granules.get(unit, 0), positions)
    return granules
