"""Transforms of a batch before it enters a sub-network."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradaug_hf.objective.sampling import Subnet
from gradaug_hf.utils.randomness import seeded

ImageTransform = Callable[[Tensor], Tensor]


class RandomQuarterTurn(nn.Module):
    """Turn a batch of images by 0, 90, 180 or 270 degrees, all alike, as GradAug does with their size.

    Examples:
        >>> RandomQuarterTurn()(images).shape
        torch.Size([4, 3, 64, 64])
    """

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (..., H, W); those that are not square may come out as (..., W, H)."""
        return images.rot90(int(torch.randint(4, ())), dims=(-2, -1))


def resize(images: Tensor, resolution: int) -> Tensor:
    """Resize a batch to a shorter side of `resolution`: bilinear, align_corners=True (arXiv 2006.07989).

    Args:
        images: (N, C, H, W), floating point; returned as they are where the size is right already.
        resolution: shorter side of the result, in pixels.

    Raises:
        ValueError: images are not a floating-point (N, C, H, W).
    """
    check_images(images)
    size = resized_shape(images.shape[2:], resolution)
    if size == images.shape[2:]:
        return images
    return functional.interpolate(images, size=size, mode="bilinear", align_corners=True)


def resized_shape(shape: Sequence[int], resolution: int) -> tuple[int, int]:
    """Return the (height, width) of images of a shape once their shorter side is `resolution`."""
    height, width = shape
    side = min(height, width)
    return round(height * resolution / side), round(width * resolution / side)


def transform_for_subnet(images: Tensor, subnet: Subnet, transform: ImageTransform | None = None) -> Tensor:
    """Return the images that a sub-network sees: transformed, where there is a transform, and at its resolution.

    Args:
        images: (N, C, H, W).
        subnet: its `seed` is that of the random numbers which `transform` takes from Python, NumPy and torch, its
            `resolution` the size.
        transform: maps images (N, C, H, W) to such images, for example a `torchvision.transforms.v2` module.
    """
    if transform is not None:
        with seeded(subnet.seed, images.device):
            images = transform(images)
    return images if subnet.resolution is None else resize(images, subnet.resolution)


def check_images(images: Tensor) -> None:
    """Raise a ValueError unless images are a floating-point (N, C, H, W)."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images have shape {tuple(images.shape)} and dtype {images.dtype}; expected floating point (N, C, H, W)"
        )
