"""Cost of a GradAug step over that of plain training, as the paper counts it."""

from collections.abc import Sequence


def relative_cost(
    num_subnets: int,
    min_width: float,
    max_width: float,
    resolutions: Sequence[int],
    side: int,
) -> float:
    """Multiply-adds of a step with sub-networks of random width over those of a plain one, as expected over the draws.

    They grow with the square of the width multiplier and of the side: 1 + E[s²] (min_width² + (n - 1) E[w²]), with the
    scale s of the images and the widths w (arXiv 2006.07989).

    Args:
        num_subnets: number n of sub-networks.
        min_width: width multiplier of the narrowest, which is in every step.
        max_width: upper end of the widths of the others, which are uniform in [min_width, max_width].
        resolutions: sides in pixels, one of which is drawn for each sub-network.
        side: of the full network's images, in pixels.
    """
    if num_subnets == 0:
        return 1.0
    scale = sum((resolution / side) ** 2 for resolution in resolutions) / len(resolutions)
    width = (min_width**2 + min_width * max_width + max_width**2) / 3
    return 1 + scale * (min_width**2 + (num_subnets - 1) * width)
