"""Plan the slices of each module from the traced axes."""

from collections import defaultdict
from collections.abc import Iterable
from math import gcd, prod

from gradaug_hf.slimming.analysis.axes import Axis, Segment, Unit, free_units, resolve, segment_size
from gradaug_hf.slimming.analysis.tracing import Trace
from gradaug_hf.slimming.patching import Slices
from gradaug_hf.slimming.patterns import Kept, Pattern, Whole, is_sliced


class Plan:
    """Give the patterns of a finished trace. A unit is sliced while it is free and not held whole on trial."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.held: set[Unit] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take in what has been tied or fixed since."""
        self._inner = _inner_units(self._all_axes())
        self._granules = _granules(axis for axes in self.trace.stored.values() for axis in axes)

    def _all_axes(self) -> Iterable[Axis]:
        for axes in self.trace.stored.values():
            yield from axes
        for guesses in self.trace.attributes.values():
            for axes in guesses:
                yield from axes
        for call in self.trace.calls:
            yield from call.axes()

    def is_sliced(self, unit: Unit) -> bool:
        return unit.free and unit not in self._inner and unit not in self.held

    def sliced_units(self, axes: Iterable[Axis]) -> list[Unit]:
        return [unit for unit in free_units(axes) if self.is_sliced(unit)]

    def snapshot(self) -> dict[Unit, tuple[Axis | None, str | None]]:
        """Return the state of all units, to go back to after a trial."""
        state: dict[Unit, tuple[Axis | None, str | None]] = {}
        pending = list(self._all_axes())
        while pending:
            for segment in pending.pop():
                for unit in segment:
                    if unit not in state:
                        state[unit] = unit.binding, unit.reason
                        if unit.binding is not None:
                            pending.append(unit.binding)
        return state

    def restore(self, state: dict[Unit, tuple[Axis | None, str | None]]) -> None:
        for unit, (binding, reason) in state.items():
            unit.binding, unit.reason = binding, reason
        self.refresh()

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
            if self.is_sliced(unit):
                granule = self._granules.get(unit, 1)
                return Kept(prod(sizes[:place]), unit.size, prod(sizes[place + 1 :]), granule)
        return Whole(prod(sizes))

    def patterns(self, axes: Iterable[Axis]) -> tuple[Pattern, ...]:
        return tuple(self.pattern(axis) for axis in axes)

    def slices(self) -> dict[str, Slices]:
        """Return the slices of each module, by its name."""
        plan: dict[str, Slices] = defaultdict(Slices)
        for (module, name), axes in self.trace.stored.items():
            patterns = self.patterns(axes)
            if any(map(is_sliced, patterns)):
                plan[module].tensors[name] = patterns
        for (module, name), guesses in self.trace.attributes.items():
            for patterns in map(self.patterns, guesses):
                if any(map(is_sliced, patterns)):
                    plan[module].attributes[name] = patterns
                    break
        for module, name in sorted(self.trace.written):
            plan[module].written.add(name)
        for module, name in sorted(self.trace.caches):
            plan[module].caches.add(name)
        return dict(plan)


def _inner_units(axes: Iterable[Axis]) -> set[Unit]:
    """Return the units of products (heads x head size) that stay whole; the one met first as outermost is sliced."""
    inner: set[Unit] = set()
    outer: set[Unit] = set()
    for segment in (segment for axis in axes for segment in resolve(axis)):
        candidates = [unit for unit in segment if unit.free and unit not in inner]
        if len(candidates) > 1:
            kept = next((unit for unit in candidates if unit in outer), candidates[0])
            outer.add(kept)
            inner.update(unit for unit in candidates if unit is not kept)
    return inner


def _granules(axes: Iterable[Axis]) -> dict[Unit, int]:
    """Return the positions by which every dimension that holds a unit grows with one more channel."""
    granules: dict[Unit, int] = {}
    for segment in (segment for axis in axes for segment in resolve(axis)):
        for unit in segment:
            if unit.free:
                granules[unit] = gcd(granules.get(unit, 0), segment_size(segment) // unit.size)
    return granules
