"""Sub-networks and how they are drawn."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Subnet:
    """What one sub-network pass uses.

    Args:
        width: width multiplier in (0, 1] of all layers.
        resolution: shorter side of its images in pixels; None leaves them as they are.
        seed: of what is drawn at random within the pass.
    """

    width: float = 1.0
    resolution: int | None = None
    seed: int = 0


class SubnetSampler:
    """Draws the sub-networks of a step: the smallest always, the others at random (sandwich rule, arXiv 1903.05134).

    A pure function of its settings, the seed and the step: the same on every rank and in every process, untouched by
    and not touching the global random numbers, with nothing to store for resuming.

    Args:
        num_subnets: number of sub-networks, at least 0.
        min_width: width multiplier of the narrowest, in (0, 1].
        max_width: upper end of the widths of the others, in [min_width, 1].
        resolutions: sides in pixels, one of which is drawn for each sub-network; None leaves the images as they are.
        width_levels: None draws widths uniformly from [min_width, max_width]; k draws from k evenly spaced ones.
        seed: any integer.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        num_subnets: int = 3,
        min_width: float = 0.9,
        max_width: float = 1.0,
        resolutions: Sequence[int] | None = None,
        width_levels: int | None = None,
        seed: int = 0,
    ) -> None:
        if not _is_integer(num_subnets) or num_subnets < 0:
            raise ValueError(f"num_subnets is {num_subnets!r}; it must be an integer of at least 0")
        if not 0 < min_width <= 1:
            raise ValueError(f"min_width is {min_width!r}; it must lie in (0, 1]")
        if not min_width <= max_width <= 1:
            raise ValueError(f"max_width is {max_width!r}; it must lie in [min_width, 1] = [{min_width!r}, 1]")
        if width_levels is not None and (not _is_integer(width_levels) or width_levels < 2):
            raise ValueError(f"width_levels is {width_levels!r}; it must be None or an integer of at least 2")
        if resolutions is not None and (len(resolutions) == 0 or not all(_is_positive(side) for side in resolutions)):
            raise ValueError(
                f"resolutions is {resolutions!r}; it must be None or a non-empty list of positive integers"
            )
        self.num_subnets = num_subnets
        self.min_width = min_width
        self.max_width = max_width
        self.resolutions = None if resolutions is None else tuple(resolutions)
        self.width_levels = width_levels
        self.seed = seed

    def sample(self, step: int) -> list[Subnet]:
        """The sub-networks of a step, the widest first.

        Args:
            step: number of the optimiser step; all batches accumulated into one step share its sub-networks.
        """
        if self.num_subnets == 0:
            return []
        rng = random.Random(f"{self.seed} {step}")  # a string is hashed the same in every process
        widths = [self._draw_width(rng) for _ in range(self.num_subnets - 1)]
        return [
            Subnet(width, self._draw_resolution(rng), rng.getrandbits(32))
            for width in [*sorted(widths, reverse=True), self.min_width]
        ]

    def _draw_width(self, rng: random.Random) -> float:
        if self.width_levels is None:
            return rng.uniform(self.min_width, self.max_width)
        level = rng.randrange(self.width_levels) / (self.width_levels - 1)
        return (1 - level) * self.min_width + level * self.max_width

    def _draw_resolution(self, rng: random.Random) -> int | None:
        return None if self.resolutions is None else rng.choice(self.resolutions)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(side: object) -> bool:
    return _is_integer(side) and side > 0
