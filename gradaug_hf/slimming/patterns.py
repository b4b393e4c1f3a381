"""Describe the positions of a dimension that a width keeps, as data that a sliced layer carries."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, gcd

import torch


def kept_channels(size: int, width: float, divisor: int = 1) -> int:
    """Return the number of channels that a width multiplier keeps (slimmable networks, arXiv 1903.05134).

    Args:
        size: number of channels at full width.
        width: width multiplier in (0, 1].
        divisor: the count is rounded to the nearest multiple of it, at least one multiple.

    Returns:
        A count in 1..size; `size` itself at width 1.
    """
    if width >= 1:
        return size
    return min(size, max(divisor, floor(size * width / divisor + 0.5) * divisor))


@dataclass(frozen=True)
class Width:
    """Hold a width multiplier and the divisor its channel counts are rounded to."""

    multiplier: float = 1.0
    divisor: int = 1

    def keep(self, segment: "Kept") -> int:
        return kept_channels(segment.size, self.multiplier, self.divisor // gcd(self.divisor, segment.granule))


@dataclass(frozen=True)
class Kept:
    """Keep the first channels of a unit, as they lie in a dimension: `repeat` times a run of `size` blocks of `block`.

    Args:
        repeat: how many runs follow each other (the groups of a convolution; query, key and value).
        size: number of channels of the unit, of which the first ones are kept in every run.
        block: positions that belong to one channel (the head size where heads are sliced).
        granule: positions by which the unit's dimensions grow with one more channel; counts towards the divisor.
    """

    repeat: int
    size: int
    block: int
    granule: int = 1

    @property
    def full_size(self) -> int:
        return self.repeat * self.size * self.block

    def size_at(self, width: Width) -> int:
        return self.repeat * width.keep(self) * self.block

    def take(self, tensor: torch.Tensor, dim: int, width: Width) -> torch.Tensor:
        length = width.keep(self) * self.block
        if self.repeat == 1:
            return tensor.narrow(dim, 0, length)
        runs = tensor.unflatten(dim, (self.repeat, self.size * self.block))
        return runs.narrow(dim + 1, 0, length).flatten(dim, dim + 1)


@dataclass(frozen=True)
class Whole:
    """Keep positions at every width."""

    full_size: int

    def size_at(self, width: Width) -> int:
        return self.full_size

    def take(self, tensor: torch.Tensor, dim: int, width: Width) -> torch.Tensor:
        return tensor


Pattern = tuple[Kept | Whole, ...]


def pattern_size(pattern: Pattern, width: Width) -> int:
    return sum(part.size_at(width) for part in pattern)


def is_sliced(pattern: Pattern) -> bool:
    return any(isinstance(part, Kept) for part in pattern)


def is_prefix(pattern: Pattern) -> bool:
    """Return True if a pattern is the first positions of its dimension."""
    return len(pattern) == 1 and isinstance(pattern[0], Kept) and pattern[0].repeat == 1


@dataclass(frozen=True)
class Cut:
    """Describe which positions of a tensor a width keeps, prepared so that a pass takes them quickly.

    Args:
        prefixes: dimensions of which the first positions are kept.
        others: dimensions with another pattern, which cannot be taken by a view of the tensor.
    """

    prefixes: tuple[tuple[int, Kept], ...]
    others: tuple[tuple[int, Pattern], ...]

    @classmethod
    def of(cls, patterns: Sequence[Pattern]) -> "Cut":
        """Return the cut of a tensor with one pattern for each dimension."""
        prefixes = tuple((dim, pattern[0]) for dim, pattern in enumerate(patterns) if is_prefix(pattern))
        others = ((d, pattern) for d, pattern in enumerate(patterns) if is_sliced(pattern) and not is_prefix(pattern))
        return cls(prefixes, tuple(others))

    def take(self, tensor: torch.Tensor, width: Width) -> torch.Tensor:
        """Return the kept positions; a view where all dimensions are prefixes.

        Prefixes are taken at once, whose backward fills one full-size gradient, in the tensor's own memory format.
        Narrowing dimension after dimension would fill one for each, and lose the format.

        Args:
            tensor: parameter or buffer at full width.
            width: what is kept of it.
        """
        tensor = self.view(tensor, width)
        for dim, pattern in self.others:
            tensor = take_pattern(tensor, dim, pattern, width)
        return tensor

    def view(self, tensor: torch.Tensor, width: Width) -> torch.Tensor:
        """Return a view of the kept positions of the prefixes; the tensor itself where they are all of it."""
        sizes = list(tensor.shape)
        for dim, kept in self.prefixes:
            sizes[dim] = width.keep(kept) * kept.block
        if sizes == list(tensor.shape):
            return tensor
        return tensor.as_strided(sizes, tensor.stride())  # from where the tensor itself begins


def take_pattern(tensor: torch.Tensor, dim: int, pattern: Pattern, width: Width) -> torch.Tensor:
    """Return the kept positions of one dimension; a view where the pattern is a single run."""
    if len(pattern) == 1:
        return pattern[0].take(tensor, dim, width)
    pieces = tensor.split([part.full_size for part in pattern], dim)
    return torch.cat([part.take(piece, dim, width) for part, piece in zip(pattern, pieces, strict=True)], dim)
