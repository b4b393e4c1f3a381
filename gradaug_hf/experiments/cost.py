"""Cost of a GradAug step over that of plain training, as the paper counts it."""

from collections.abc import Sequence


def relative_cost(
    num_subnets: int,
    min_width: float,
    max_width: float,
    resolutions: Sequence[int],
    side: int,
    share: float = 1.0,
) -> float:
    """Return the expected multiply-adds of a step with sub-networks of random width over those of a plain one.

    They grow with the square of the width multiplier and of the side: 1 + E[s²] (min_width² + (n - 1) E[w²]), with the
    scale s of the images and the widths w (arXiv 2006.07989). Sub-networks on a part of the images cost that part.

    Args:
        num_subnets: number n of sub-networks.
        min_width: width multiplier of the narrowest, which is in every step.
        max_width: upper end of the widths of the others, which are uniform in [min_width, max_width].
        resolutions: sides in pixels, one of which is sampled for each sub-network.
        side: of the full network's images, in pixels.
        share: of the batch that a sub-network sees, in (0, 1].
    """
    if num_subnets == 0:
        return 1.0
    scale = sum((resolution / side) ** 2 for resolution in resolutions) / len(resolutions)
    width = (min_width**2 + min_width * max_width + max_width**2) / 3
    return 1 + share * scale * (min_width**2 + (num_subnets - 1) * width)
