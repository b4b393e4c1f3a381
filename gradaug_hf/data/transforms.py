"""The paper's transforms of images."""

from collections.abc import Callable

import PIL.Image
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import v2

from gradaug_hf.models.cifar import CIFAR_MEAN, CIFAR_STD

Transform = Callable[[PIL.Image.Image], Tensor]

# Long side of an image over its short side, beyond which its ends are cut off before it is resized. They are never in
# the square that is cut from the centre afterwards.
LONGEST = 16


class LimitAspectRatio(v2.Transform):
    """Cut the ends off a very long or very high image, which would take minutes to resize by its short side."""

    def forward(self, image: PIL.Image.Image | Tensor) -> PIL.Image.Image | Tensor:
        """Return the centre of the image, or the image itself where it is not too long."""
        height, width = v2.functional.get_size(image)
        longest = LONGEST * min(height, width)
        if max(height, width) <= longest:
            return image
        longest -= (max(height, width) - longest) % 2  # the centre stays where it is
        return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])


def cifar_transform(
    train: bool,
    *,
    size: int = 32,
    flip: bool = True,
    mean: tuple[float, ...] = CIFAR_MEAN,
    std: tuple[float, ...] = CIFAR_STD,
) -> Transform:
    """Return the paper's CIFAR transform: for training a reflected border of an eighth, a random crop and a flip.

    Images of another size are first resized and cropped to a square.

    Args:
        train: Whether to augment.
        size: Side of the square in pixels.
        flip: Whether to flip half of the training images; wrong where left and right matter, as for digits.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, in 0..1.

    Examples:
        >>> cifar_transform(train=True)(PIL.Image.new("RGB", (40, 60))).shape
        torch.Size([3, 32, 32])
    """
    steps = [LimitAspectRatio(), v2.Resize(size), v2.CenterCrop(size)]
    if train:
        steps.append(v2.RandomCrop(size, padding=size // 8, padding_mode="reflect"))
        if flip:
            steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, *_to_tensor(mean, std)])


def imagenet_transform(
    train: bool,
    *,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
) -> Transform:
    """Return the paper's ImageNet transform to 224x224 pixels.

    For training a random resized crop, a flip and colour jitter of 0.4 in brightness, contrast and saturation; for
    evaluation the centre of the image with a short side of 256.

    Args:
        train: Whether to augment.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, in 0..1.

    Examples:
        >>> imagenet_transform(train=False)(PIL.Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])
    """
    if train:
        steps = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4)]
    else:
        steps = [LimitAspectRatio(), v2.Resize(256), v2.CenterCrop(224)]
    return v2.Compose([*steps, *_to_tensor(mean, std)])


def _to_tensor(mean: tuple[float, ...], std: tuple[float, ...]) -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
