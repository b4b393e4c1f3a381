"""The 15 common corruptions of ImageNet-C (arXiv 1903.12261), from the library `imagecorruptions-imaug`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gradaug_hf.utils.randomness import seeded

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 32
# Those with random numbers of their own instead of NumPy's global ones.
WITH_SEED = ("impulse_noise", "glass_blur")


def check_corruptions(side: int) -> None:
    """Compile what the library compiles, before workers are forked.

    Raises:
        ValueError: the library is not there, or the images are too small for it.
    """
    try:
        import imagecorruptions  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the corruptions need imagecorruptions-imaug: pip install 'gradaug_hf[robustness]', or give "
            f"--no_corruptions ({error})"
        ) from error
    if side < SMALLEST_SIDE:
        raise ValueError(f"image_size is {side}; the corruptions need at least {SMALLEST_SIDE} pixels")
    corrupt_image(torch.zeros(3, SMALLEST_SIDE, SMALLEST_SIDE, dtype=torch.uint8), "glass_blur", 1, seed=0)


def corrupt_image(pixels: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Corrupt an image with ImageNet-C's settings of a severity, whatever the size of the image.

    Args:
        pixels: uint8 (3, H, W), of at least 32 pixels a side.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the random numbers of the corruption.
    """
    from imagecorruptions import corrupt

    own_seed = {"seed": seed} if name in WITH_SEED else {}
    with seeded(seed):
        corrupted = corrupt(pixels.permute(1, 2, 0).numpy(), severity, name, **own_seed)
    return torch.from_numpy(corrupted.copy()).permute(2, 0, 1)  # some corruptions return what cannot be written to


class CorruptedImages(Dataset):
    """A dataset under one corruption, whose random numbers follow from the seed, the index and the corruption.

    Its images have `pixel_values`, uint8 (3, H, W), and `labels`.
    """

    def __init__(self, images: Sequence[Mapping[str, Any]], name: str, severity: int, seed: int):
        self.images = images
        self.name = name
        self.severity = severity
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.images[index]
        entropy = (self.seed, index, CORRUPTIONS.index(self.name), self.severity)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        return {
            "pixel_values": corrupt_image(example["pixel_values"], self.name, self.severity, seed),
            "labels": example["labels"],
        }
