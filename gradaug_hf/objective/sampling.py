"""Sub-networks and how they are sampled."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from transformers.hf_argparser import HfArg

from gradaug_hf.utils.settings import documented_by, taken_from

SubnetMode = Literal["width", "depth", "width+depth", "tokens"]
SUBNET_MODES = get_args(SubnetMode)
SPLIT = "split"
# Images of a part at least, where the batch has as many: batch norm needs two.
FEWEST_IMAGES = 2


@dataclass(frozen=True)
class Part:
    """The images of a batch that one sub-network sees.

    The parts of a step follow each other in one random order of the batch, and begin again at its end.

    Args:
        index: number of the sub-network within its step.
        share: of the batch, in (0, 1].
        seed: of the order, which the sub-networks of a step share.
    """

    index: int
    share: float
    seed: int

    def indices(self, batch_size: int) -> list[int]:
        """Return the positions of the images in a batch: at least two of them, or all of a smaller batch.

        Args:
            batch_size: images in the batch. Where the share of it is no integer, parts differ by one image.
        """
        order = random.Random(self.seed).sample(range(batch_size), batch_size)
        start, stop = (math.floor(index * self.share * batch_size + 0.5) for index in (self.index, self.index + 1))
        size = max(stop - start, min(FEWEST_IMAGES, batch_size))
        return [order[(start + position) % batch_size] for position in range(size)]


@dataclass(frozen=True)
class Subnet:
    """The settings of one sub-network pass.

    Args:
        width: width multiplier in (0, 1] of all layers.
        resolution: shorter side of its images in pixels; None leaves them as they are.
        seed: of what is sampled within the pass.
        survival: probability in (0, 1] with which the last residual block is kept; it falls linearly from 1 at the
            first (stochastic depth, arXiv 1603.09382).
        part: the images of the batch that it sees; None: all.
        tokens: share of the patches of an image that a vision transformer sees, in (0, 1].

    Examples:
        >>> Subnet(width=0.9, resolution=192).tokens
        1.0
    """

    width: float = 1.0
    resolution: int | None = None
    seed: int = 0
    survival: float = 1.0
    part: Part | None = None
    tokens: float = 1.0

    def dropped_blocks(self, num_blocks: int) -> frozenset[int]:
        """Return the indices of the residual blocks that the pass drops, sampled with its seed.

        Args:
            num_blocks: how many blocks the model has that can be dropped. One alone is the last.

        Raises:
            ValueError: `survival` is out of range.
        """
        check_share("survival", self.survival)
        rng = random.Random(self.seed)
        ways = [index / (num_blocks - 1) for index in range(num_blocks)] if num_blocks > 1 else [1.0] * num_blocks
        return frozenset(index for index, way in enumerate(ways) if rng.random() >= 1 - way * (1 - self.survival))


@dataclass
class SubnetSettings:
    """Settings of a step's sub-networks, shared by `SubnetSampler`, `GradAug` and `GradAugConfig`."""

    num_subnets: int = HfArg(
        default=3, help="Number of sub-networks in each training step, at least 0; 0 is plain training."
    )
    min_width: float = HfArg(
        default=0.9, help="Width multiplier of the narrowest sub-network, which is in every step; in (0, 1]."
    )
    max_width: float = HfArg(default=1.0, help="Upper end of the widths of the other sub-networks; in [min_width, 1].")
    resolutions: list[int] | None = HfArg(
        default=None,
        help="Sides in pixels, one of which is sampled for each sub-network; by default 1, 6/7, 5/7 and 4/7 of the "
        "input side.",
    )
    width_levels: int | None = HfArg(
        default=None,
        help="Number of evenly spaced widths to sample from, at least 2; by default widths are continuous, as in "
        "the paper.",
    )
    subnet_mode: SubnetMode = HfArg(
        default="width",
        help='What a sub-network leaves out; "width": the last channels, "depth": residual blocks at random, '
        '"width+depth": both, "tokens": patches of each image at random, in a vision transformer.',
    )
    min_survival: float = HfArg(
        default=0.8,
        help='With "depth", probability with which a sub-network keeps the last residual block, in (0, 1]; it '
        "falls linearly from 1 at the first.",
    )
    min_tokens: float = HfArg(
        default=0.5,
        help='With "tokens", share of the patches of an image that one sub-network of each step sees, in (0, 1]; '
        "the others see a random share between it and 1.",
    )
    subnet_interval: int = HfArg(
        default=1,
        help="With k, sub-networks run in the steps 0, k, 2k and so on, and the full network alone in the others, "
        "which cost as much as plain training; at least 1.",
    )
    # None is there for HfArgumentParser, which reads `float | str | None` as text.
    subnet_images: float | str | None = HfArg(
        default=1.0,
        help='Share of the batch that a sub-network sees, in (0, 1]; "split": each of n sub-networks sees its own '
        "n-th. The objective is the same on average, and sub-networks cost the share of what they cost else.",
    )

    def __post_init__(self) -> None:
        self._check("num_subnets", _is_integer(self.num_subnets, at_least=0), "an integer of at least 0")
        check_share("min_width", self.min_width)
        if not self.min_width <= self.max_width <= 1:
            raise ValueError(
                f"max_width is {self.max_width!r}; it must lie in [min_width, 1] = [{self.min_width!r}, 1]"
            )
        levels, sides = self.width_levels, self.resolutions
        self._check(
            "width_levels", levels is None or _is_integer(levels, at_least=2), "None or an integer of at least 2"
        )
        are_sides = sides is None or (len(sides) > 0 and all(_is_integer(side, at_least=1) for side in sides))
        self._check("resolutions", are_sides, "None or a non-empty list of positive integers")
        self._check("subnet_mode", self.subnet_mode in SUBNET_MODES, f"one of {', '.join(map(repr, SUBNET_MODES))}")
        check_share("min_survival", self.min_survival)
        check_share("min_tokens", self.min_tokens)
        self._check("subnet_interval", _is_integer(self.subnet_interval, at_least=1), "an integer of at least 1")
        self.subnet_images = _as_share(self.subnet_images)

    def _check(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")

    @property
    def subnet_share(self) -> float:
        """Share of the batch that a sub-network sees, as a number."""
        return 1 / max(1, self.num_subnets) if self.subnet_images == SPLIT else self.subnet_images


@documented_by(SubnetSettings)
@dataclass
class SubnetSampler(SubnetSettings):
    """Sample the sub-networks of a step: always the narrowest, and random ones (sandwich rule, arXiv 1903.05134).

    A pure function of its settings, the seed and the step: the same on every rank and in every process, untouched by
    and not touching the global random numbers, with nothing to store for resuming. Without `resolutions` images are
    left as they are.

    Args:
        {fields}
        seed: any integer.

    Raises:
        ValueError: a setting is out of its range.

    Examples:
        >>> subnets = SubnetSampler(min_width=0.8, resolutions=[32, 28, 24]).sample(step=0)
        >>> len(subnets), min(subnet.width for subnet in subnets)
        (3, 0.8)
    """

    seed: int = 0

    @classmethod
    def from_settings(cls, settings: object, **others: Any) -> "SubnetSampler":
        """Return the sampler that an object of the same settings describes.

        Args:
            settings: has all of the sampler's settings as attributes, as a `GradAugConfig` does.
            others: settings that win over those.
        """
        return cls(**taken_from(cls, settings) | others)

    def sample(self, step: int) -> list[Subnet]:
        """Return the sub-networks of a step, the widest first; none between those of `subnet_interval`.

        Args:
            step: number of the optimiser step; all batches accumulated into one step share its sub-networks.
        """
        if self.num_subnets == 0 or step % self.subnet_interval != 0:
            return []
        rng = random.Random(f"{self.seed} {step}")  # a string is hashed the same in every process
        widths = self._sample_widths(rng) if drops_channels(self.subnet_mode) else [1.0] * self.num_subnets
        survival = self.min_survival if drops_blocks(self.subnet_mode) else 1.0
        subnets = [Subnet(width, self._sample_resolution(rng), rng.getrandbits(32), survival) for width in widths]
        if self.subnet_mode == "tokens":
            shares = sorted((rng.uniform(self.min_tokens, 1) for _ in subnets[1:]), reverse=True)
            subnets = [replace(s, tokens=share) for s, share in zip(subnets, [*shares, self.min_tokens], strict=True)]
        if (share := self.subnet_share) == 1:
            return subnets
        order = rng.getrandbits(32)
        return [replace(subnet, part=Part(index, share, order)) for index, subnet in enumerate(subnets)]

    def _sample_widths(self, rng: random.Random) -> list[float]:
        widths = [self._sample_width(rng) for _ in range(self.num_subnets - 1)]
        return [*sorted(widths, reverse=True), self.min_width]

    def _sample_width(self, rng: random.Random) -> float:
        if self.width_levels is None:
            return rng.uniform(self.min_width, self.max_width)
        level = rng.randrange(self.width_levels) / (self.width_levels - 1)
        return (1 - level) * self.min_width + level * self.max_width

    def _sample_resolution(self, rng: random.Random) -> int | None:
        return None if self.resolutions is None else rng.choice(self.resolutions)


def check_share(name: str, share: float) -> None:
    """Raise a ValueError that names a setting unless it is a share in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"{name} is {share!r}; it must lie in (0, 1]")


def drops_channels(subnet_mode: str) -> bool:
    """Return whether sub-networks of a mode are narrower than the model."""
    return subnet_mode in ("width", "width+depth")


def drops_blocks(subnet_mode: str) -> bool:
    """Return whether sub-networks of a mode leave out residual blocks."""
    return subnet_mode in ("depth", "width+depth")


def _as_share(images: Any) -> float | str:
    try:
        share = images if images == SPLIT else float(images)
    except (TypeError, ValueError):
        share = math.nan
    if share != SPLIT and (not 0 < share <= 1 or isinstance(images, bool)):
        raise ValueError(f"subnet_images is {images!r}; it must be {SPLIT!r} or a share in (0, 1]")
    return share


def _is_integer(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least
