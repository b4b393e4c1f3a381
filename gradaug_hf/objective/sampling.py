"""Sub-networks and how they are drawn."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

SUBNET_MODES = ("width", "depth", "width+depth")


@dataclass(frozen=True)
class Subnet:
    """What one sub-network pass uses.

    Args:
        width: width multiplier in (0, 1] of all layers.
        resolution: shorter side of its images in pixels; None leaves them as they are.
        seed: of what is drawn at random within the pass.
        survival: probability in (0, 1] with which the last residual block is kept; it falls linearly from 1 at the
            first (stochastic depth, arXiv 1603.09382).
    """

    width: float = 1.0
    resolution: int | None = None
    seed: int = 0
    survival: float = 1.0

    def dropped_blocks(self, num_blocks: int) -> frozenset[int]:
        """Indices of the residual blocks that the pass drops, drawn from its seed.

        Args:
            num_blocks: how many blocks the network has that can be dropped. One alone is the last.

        Raises:
            ValueError: `survival` is out of range.
        """
        check_survival("survival", self.survival)
        rng = random.Random(self.seed)
        ways = [index / (num_blocks - 1) for index in range(num_blocks)] if num_blocks > 1 else [1.0] * num_blocks
        return frozenset(index for index, way in enumerate(ways) if rng.random() >= 1 - way * (1 - self.survival))


class SubnetSampler:
    """Draws the sub-networks of a step: the narrowest always, the others at random (sandwich rule, arXiv 1903.05134).

    A pure function of its settings, the seed and the step: the same on every rank and in every process, untouched by
    and not touching the global random numbers, with nothing to store for resuming.

    Args:
        num_subnets: number of sub-networks, at least 0.
        min_width: width multiplier of the narrowest, in (0, 1].
        max_width: upper end of the widths of the others, in [min_width, 1].
        resolutions: sides in pixels, one of which is drawn for each sub-network; None leaves the images as they are.
        width_levels: None draws widths uniformly from [min_width, max_width]; k draws from k evenly spaced ones.
        seed: any integer.
        subnet_mode: what a sub-network leaves out; "width": its last channels, "depth": residual blocks at random,
            "width+depth": both. Without "width" all have the width 1.
        min_survival: with "depth", probability in (0, 1] with which the last residual block is kept.
        subnet_interval: k draws sub-networks for steps 0, k, 2k and so on, and none for the others.

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
        subnet_mode: str = "width",
        min_survival: float = 0.8,
        subnet_interval: int = 1,
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
        if subnet_mode not in SUBNET_MODES:
            raise ValueError(f"subnet_mode is {subnet_mode!r}; it must be one of {', '.join(map(repr, SUBNET_MODES))}")
        check_survival("min_survival", min_survival)
        if not _is_positive(subnet_interval):
            raise ValueError(f"subnet_interval is {subnet_interval!r}; it must be an integer of at least 1")
        self.num_subnets = num_subnets
        self.min_width = min_width
        self.max_width = max_width
        self.resolutions = None if resolutions is None else tuple(resolutions)
        self.width_levels = width_levels
        self.seed = seed
        self.subnet_mode = subnet_mode
        self.min_survival = min_survival
        self.subnet_interval = subnet_interval

    def sample(self, step: int) -> list[Subnet]:
        """The sub-networks of a step, the widest first; none between those of `subnet_interval`.

        Args:
            step: number of the optimiser step; all batches accumulated into one step share its sub-networks.
        """
        if self.num_subnets == 0 or step % self.subnet_interval != 0:
            return []
        rng = random.Random(f"{self.seed} {step}")  # a string is hashed the same in every process
        widths = self._draw_widths(rng) if drops_channels(self.subnet_mode) else [1.0] * self.num_subnets
        survival = self.min_survival if drops_blocks(self.subnet_mode) else 1.0
        return [Subnet(width, self._draw_resolution(rng), rng.getrandbits(32), survival) for width in widths]

    def _draw_widths(self, rng: random.Random) -> list[float]:
        widths = [self._draw_width(rng) for _ in range(self.num_subnets - 1)]
        return [*sorted(widths, reverse=True), self.min_width]

    def _draw_width(self, rng: random.Random) -> float:
        if self.width_levels is None:
            return rng.uniform(self.min_width, self.max_width)
        level = rng.randrange(self.width_levels) / (self.width_levels - 1)
        return (1 - level) * self.min_width + level * self.max_width

    def _draw_resolution(self, rng: random.Random) -> int | None:
        return None if self.resolutions is None else rng.choice(self.resolutions)


def check_survival(name: str, survival: float) -> None:
    if not 0 < survival <= 1:
        raise ValueError(f"{name} is {survival!r}; it must lie in (0, 1]")


def drops_channels(subnet_mode: str) -> bool:
    """Whether sub-networks of a mode are narrower than the network."""
    return subnet_mode in ("width", "width+depth")


def drops_blocks(subnet_mode: str) -> bool:
    """Whether sub-networks of a mode leave out residual blocks."""
    return subnet_mode in ("depth", "width+depth")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return _is_integer(value) and value > 0
