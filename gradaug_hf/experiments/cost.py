"""Cost of a GradAug step over that of plain training, as the paper counts it."""

from gradaug_hf.objective.resolutions import default_resolutions
from gradaug_hf.objective.sampling import SubnetSettings, drops_blocks, drops_channels


def relative_cost(settings: SubnetSettings, side: int | None = None) -> float:
    """Return the expected multiply-adds of a step with sub-networks over those of a plain step.

    They grow with the square of the width multiplier and of the side: 1 + E[s²] (min_width² + (n - 1) E[w²]), with the
    scale s of the images and the widths w (arXiv 2006.07989). They grow linearly with the share of the residual
    blocks, of the patches of an image, and of the images of the batch.

        relative_cost(SubnetSettings(min_width=0.8, resolutions=[32, 28, 24], subnet_images="split"))

    Args:
        settings: of the sub-networks, for example a `GradAugConfig`.
        side: of the full network's images, in pixels; None: the largest of the resolutions.
    """
    if settings.num_subnets == 0:
        return 1.0
    sides = settings.resolutions or default_resolutions(side or 7)
    scale = sum((each / (side or max(sides))) ** 2 for each in sides) / len(sides)
    others = settings.num_subnets - 1
    kept = settings.num_subnets
    if drops_channels(settings.subnet_mode):
        kept = settings.min_width**2 + others * _mean_square_width(settings)
    if drops_blocks(settings.subnet_mode):
        kept *= (1 + settings.min_survival) / 2
    if settings.subnet_mode == "tokens":
        kept = settings.min_tokens + others * (1 + settings.min_tokens) / 2
    return 1 + settings.subnet_share * scale * kept / settings.subnet_interval


def _mean_square_width(settings: SubnetSettings) -> float:
    low, high = settings.min_width, settings.max_width
    if settings.width_levels is None:
        return (low**2 + low * high + high**2) / 3
    spacing = (high - low) / (settings.width_levels - 1)
    return sum((low + level * spacing) ** 2 for level in range(settings.width_levels)) / settings.width_levels
