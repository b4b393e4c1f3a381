"""Transforms of a batch before it enters a sub-network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from gradaug_hf.subnets import Subnet

ImageTransform = Callable[[Tensor], Tensor]


def resize(images: Tensor, resolution: int) -> Tensor:
    """Resize a batch so that its shorter side is `resolution`: bilinear, align_corners=True (arXiv 2006.07989).

    Args:
        images: (N, C, H, W), floating point; returned as they are where the size is right already.
        resolution: shorter side of the result, in pixels.

    Raises:
        ValueError: images are not a floating-point (N, C, H, W).
    """
    check_images(images)
    height, width = images.shape[2:]
    side = min(height, width)
    size = (round(height * resolution / side), round(width * resolution / side))
    if size == (height, width):
        return images
    return functional.interpolate(images, size=size, mode="bilinear", align_corners=True)


def transform_for_subnet(images: Tensor, subnet: Subnet, transform: ImageTransform | None = None) -> Tensor:
    """What a sub-network sees of a batch: `transform` if there is one, then its resolution.

    Args:
        images: (N, C, H, W).
        subnet: its `seed` is that of the random numbers `transform` draws from torch, its `resolution` the size.
        transform: maps images (N, C, H, W) to such images, for example a `torchvision.transforms.v2` module.
    """
    if transform is not None:
        with seeded(subnet.seed, images.device):
            images = transform(images)
    return images if subnet.resolution is None else resize(images, subnet.resolution)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers on the CPU and on a device; the former states come back on leaving."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=_accelerator(device)):
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device.type).manual_seed(seed)
        yield


def _accelerator(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


def check_images(images: Tensor) -> None:
    """Raise a ValueError unless images are a floating-point (N, C, H, W)."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images have shape {tuple(images.shape)} and dtype {images.dtype}; expected floating point (N, C, H, W)"
        )
