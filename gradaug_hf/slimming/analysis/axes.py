"""Describe the channels that a tensor dimension is made of: the algebra of tied channels.

A dimension (`Axis`) is a concatenation of segments, a segment is a product of units (outermost first), and a unit is a
set of channels that is either free (a sub-network keeps its first ones) or fixed (always whole). Tying two axes makes
their units the same, refining a unit into a product (heads times head size, groups times channels) or a concatenation
(the inputs of a dense block) where the other side asks for it. Where two structures do not fit, both become fixed.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from math import gcd, prod


class Unit:
    """A set of channels that are kept or left out together.

    Args:
        size: number of channels.
        reason: why the unit is always whole; None while it is free, "" for what is no channel (batch, space, kernel).
    """

    __slots__ = ("binding", "reason", "size")

    def __init__(self, size: int, reason: str | None = None) -> None:
        self.size = size
        self.reason = "a single channel" if reason is None and size == 1 else reason
        self.binding: Axis | None = None

    @property
    def free(self) -> bool:
        return self.reason is None

    def __repr__(self) -> str:
        return f"{'' if self.free else '='}{self.size}"


Segment = tuple[Unit, ...]
Axis = tuple[Segment, ...]

# A product of a whole outer part with a concatenation is written out; beyond this many segments it is fixed instead.
MAX_SEGMENTS = 1024


def axis_of(unit: Unit) -> Axis:
    return ((unit,),)


def fixed(size: int, reason: str = "") -> Axis:
    return axis_of(Unit(size, reason))


def segment_size(segment: Segment) -> int:
    return prod(unit.size for unit in segment)


def axis_size(axis: Axis) -> int:
    return sum(segment_size(segment) for segment in axis)


def resolve(axis: Axis) -> Axis:
    """Return the axis written in units that are not bound to anything else, whole neighbours merged."""
    return _merge_segments(segment for part in axis for segment in _resolve_segment(part))


def iter_units(axes: Iterable[Axis]) -> Iterator[Unit]:
    """Yield every unit of some axes, free or whole."""
    for axis in axes:
        for segment in resolve(axis):
            yield from segment


def free_units(axes: Iterable[Axis]) -> list[Unit]:
    """Return the free units of some axes, each once, in order."""
    return list(dict.fromkeys(unit for unit in iter_units(axes) if unit.free))


def fix(axis: Axis, reason: str) -> None:
    """Keep every unit of the axis whole."""
    for unit in free_units([axis]):
        unit.reason = reason


def product(axes: Sequence[Axis]) -> Axis:
    """Return the axis of flattened dimensions, outermost first."""
    return resolve((tuple(unit for axis in axes for unit in _as_factors(axis)),))


def concat(axes: Iterable[Axis]) -> Axis:
    return resolve(tuple(segment for axis in axes for segment in axis))


def unflatten(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
    """Return the axes of a dimension that is viewed as several."""
    parts = [Unit(size) for size in sizes]
    tie(axis, (tuple(parts),), reason)
    return [resolve(axis_of(part)) for part in parts]


def split(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
    """Return the axes of consecutive pieces of a dimension."""
    parts = [Unit(size) for size in sizes]
    tie(axis, tuple((part,) for part in parts), reason)
    return [resolve(axis_of(part)) for part in parts]


def tie(first: Axis, second: Axis, reason: str) -> None:
    """Make two axes of equal size the same one.

    The reason is why a unit stays whole that meets something whole or of another structure. A ValueError says that the
    sizes differ, which is a mistake of the caller.
    """
    if axis_size(first) != axis_size(second):
        raise ValueError(f"cannot tie {first} of size {axis_size(first)} to {second} of size {axis_size(second)}")
    left, right = deque(first), deque(second)
    while left and right:
        a, b = _next_segment(left), _next_segment(right)
        size = min(segment_size(a), segment_size(b))
        a = _cut_front(a, size, left, reason)
        b = _cut_front(b, size, right, reason)
        _tie_segments(a, b, reason)


def _as_factors(axis: Axis) -> Segment:
    """Return the axis as factors of a product: its own, or one unit that stands for a concatenation."""
    axis = resolve(axis)
    if len(axis) == 1:
        return axis[0]
    whole = Unit(axis_size(axis))
    whole.binding = axis
    return (whole,)


def _resolve_segment(segment: Segment) -> Axis:
    """Write out the bindings of a segment's units; the parts of a concatenation are multiplied out."""
    result: Axis = ((),)
    for unit in reversed(segment):
        outer = ((unit,),) if unit.binding is None else resolve(unit.binding)
        if unit.binding is not None:
            unit.binding = outer
        result = _multiply(outer, result)
    return result


def _multiply(outer: Axis, inner: Axis) -> Axis:
    if len(inner) == 1:
        return tuple(_merge_factors(segment + inner[0]) for segment in outer)
    repeats = axis_size(outer)
    if repeats * len(inner) > MAX_SEGMENTS:
        fix(outer, "flattened with too many pieces")
        fix(inner, "flattened with too many pieces")
        return fixed(repeats * axis_size(inner), "flattened with too many pieces")
    if repeats > 1:
        fix(outer, "flattened with a concatenation")
    return inner * repeats


def _merge_factors(segment: Iterable[Unit]) -> Segment:
    merged: list[Unit] = []
    for unit in segment:
        if unit.size == 1:
            continue
        if merged and not unit.free and not merged[-1].free:
            merged[-1] = Unit(merged[-1].size * unit.size, merged[-1].reason or unit.reason)
        else:
            merged.append(unit)
    return tuple(merged)


def _merge_segments(segments: Iterable[Segment]) -> Axis:
    merged: list[Segment] = []
    for segment in segments:
        if merged and _whole(segment) and _whole(merged[-1]):
            reason = next((unit.reason for unit in (*merged[-1], *segment) if unit.reason), "")
            merged[-1] = (Unit(segment_size(merged[-1]) + segment_size(segment), reason),)
        else:
            merged.append(segment)
    return tuple(merged)


def _whole(segment: Segment) -> bool:
    return not any(unit.free for unit in segment)


def _next_segment(segments: deque[Segment]) -> Segment:
    """Take the first segment, as the bindings made so far have it."""
    segments.extendleft(reversed(resolve((segments.popleft(),))))
    return segments.popleft()


def _cut_front(segment: Segment, size: int, rest: deque[Segment], reason: str) -> Segment:
    """Cut the first `size` positions off a segment; what is left goes back to the front of `rest`."""
    if segment_size(segment) == size:
        return segment
    outer, inner = segment[0], segment[1:]
    block = segment_size(inner)
    if size % block:
        fix(((outer,),), reason)
        fix((inner,), reason)
        outer, inner, block = Unit(segment_size(segment), outer.reason), (), 1
    front, back = _cut_unit(outer, size // block)
    rest.appendleft((back, *inner))
    return (front, *inner)


def _cut_unit(unit: Unit, size: int) -> tuple[Unit, Unit]:
    front, back = Unit(size, unit.reason), Unit(unit.size - size, unit.reason)
    if unit.free:
        unit.binding = ((front,), (back,))
    return front, back


def _factor_unit(unit: Unit, outer_size: int) -> Segment:
    outer, inner = Unit(outer_size, unit.reason), Unit(unit.size // outer_size, unit.reason)
    if unit.free:
        unit.binding = ((outer, inner),)
    return outer, inner


def _tie_segments(first: Segment, second: Segment, reason: str) -> None:
    """Tie two products of equal size, factor by factor from the outermost."""
    first, second = (tuple(unit for unit in segment if unit.size > 1) for segment in (first, second))
    while first and second:
        # Only what has been bound since is written out: that also merges whole factors, which the cuts below part.
        if any(unit.binding is not None for unit in (*first, *second)):
            a, b = resolve((first,)), resolve((second,))
            if len(a) > 1 or len(b) > 1:
                return tie(a, b, reason)
            first, second = a[0], b[0]
            continue
        outer, other = first[0], second[0]
        if outer.size == other.size:
            _tie_units(outer, other, reason)
            first, second = first[1:], second[1:]
            continue
        common = gcd(outer.size, other.size)
        if common == 1:
            fix((first,), reason)
            fix((second,), reason)
            return
        if outer.size != common:
            first = (*_factor_unit(outer, common), *first[1:])
        if other.size != common:
            second = (*_factor_unit(other, common), *second[1:])
    # What remains on one side has size one: the sizes were equal.


def _tie_units(first: Unit, second: Unit, reason: str) -> None:
    if first is second:
        return
    if first.free and second.free:
        first.binding = axis_of(second)
    elif first.free:
        first.reason = second.reason or reason
    elif second.free:
        second.reason = first.reason or reason
