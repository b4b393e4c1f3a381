import random

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import ViTImageProcessor

from gradaug_hf.data.backbone_transforms import ProcessorTransform, augmenting_transform
from tests.helpers.pictures import noise, picture

CONFIG = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}


def augmented(image: PIL.Image.Image, count: int = 20, **settings: object) -> list[torch.Tensor]:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    transform = augmenting_transform(CONFIG, **settings)
    return [transform(image) for _ in range(count)]


def test_pixels_are_normalised_by_the_backbones_own_statistics():
    (pixels,) = augmented(picture(200), 1)
    mean, std = (torch.tensor(CONFIG[name]) for name in ("mean", "std"))
    expected = (torch.tensor([200, 100, 55]) / 255 - mean) / std
    assert pixels.shape == (3, 32, 32)
    torch.testing.assert_close(pixels[:, 16, 16], expected, rtol=1e-5, atol=1e-5)


def test_crops_differ_and_colours_stay_unless_asked_for():
    crops = augmented(noise(64))
    assert len({crop.numpy().tobytes() for crop in crops}) == len(crops)
    assert len({crop.numpy().tobytes() for crop in augmented(picture(200))}) == 1
    assert len({crop.numpy().tobytes() for crop in augmented(picture(200), auto_augment="rand-m9-mstd0.5-inc1")}) > 1


@pytest.mark.parametrize(("hflip", "expected"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
def test_a_photo_is_flipped_as_often_as_asked_for(hflip: float, expected: set[bool]):
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    crops = augmented(PIL.Image.fromarray(ramp), hflip=hflip)
    assert {bool(crop[0, 0, 0] > crop[0, 0, -1]) for crop in crops} == expected


def test_a_part_of_the_photo_is_erased():
    erased = augmented(picture(200), random_erasing=1.0)
    shares = [(pixels != pixels[:, :1, :1]).any(0).float().mean().item() for pixels in erased]
    assert all(min(share, 1 - share) > 0.01 for share in shares)


def test_a_policy_that_timm_does_not_know_is_refused_with_some_that_it_knows():
    with pytest.raises(ValueError, match="auto_augment is 'strong', which timm cannot read; 'rand-m9-mstd0.5-inc1'"):
        augmenting_transform(CONFIG, auto_augment="strong")


def test_evaluation_is_that_of_the_image_processor():
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    image = noise(40)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ProcessorTransform(processor)(image), expected)
