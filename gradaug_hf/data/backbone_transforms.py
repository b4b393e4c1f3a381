"""Transforms of images for the fine-tuning of a backbone: its own evaluation, and timm's augmentation."""

from collections.abc import Mapping
from typing import Any

import PIL.Image
import timm
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from gradaug_hf.data.transforms import LimitAspectRatio, Transform

# Smallest share of a photo's area that a random crop keeps: less of it often misses the object.
MIN_CROP = 0.35
AUGMENTATIONS = "'rand-m9-mstd0.5-inc1', 'augmix-m3', 'original' or '3a', for example"


class ProcessorTransform:
    """Prepare an image as an image processor does, so that evaluation sees what the model's pipeline sees.

    transform = ProcessorTransform(AutoImageProcessor.from_pretrained(folder))
    pixels = transform(PIL.Image.open("photo.jpg"))  # (3, H, W)
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor
        self._limit = LimitAspectRatio()

    def __call__(self, image: PIL.Image.Image) -> Tensor:
        """Return the pixels (3, H, W) of an RGB image."""
        return self.processor(self._limit(image), return_tensors="pt")["pixel_values"][0]


def augmenting_transform(
    config: Mapping[str, Any], *, hflip: float = 0.5, auto_augment: str | None = None, random_erasing: float = 0.0
) -> Transform:
    """Return timm's transform for training: a random crop, resized, a flip, and what else is asked for.

    Args:
        config: `input_size` (3, H, W), `interpolation`, `mean` and `std` in 0..1.
        hflip: Probability with which an image is flipped left to right, in [0, 1].
        auto_augment: Policy of timm, 'rand-m9-mstd0.5-inc1' for example; None leaves colours and shapes as they are.
        random_erasing: Probability with which a rectangle of an image becomes noise, in [0, 1].

    Raises:
        ValueError: timm does not know the policy.
    """
    try:
        return timm.data.create_transform(
            config["input_size"],
            is_training=True,
            scale=(MIN_CROP, 1.0),
            hflip=hflip,
            color_jitter=None,
            auto_augment=auto_augment,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            re_prob=random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:  # of timm's parser of policies
        raise ValueError(f"auto_augment is {auto_augment!r}, which timm cannot read; {AUGMENTATIONS}") from error
