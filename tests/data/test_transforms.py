import time

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms import v2

from gradaug_hf.data.transforms import LimitAspectRatio, cifar_transform, imagenet_transform
from gradaug_hf.models.cifar import CIFAR_MEAN, CIFAR_STD
from tests.helpers.pictures import noise, picture


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) of 0..255, by the formula, in float64."""
    values = (pixels.astype(np.float64) / 255 - np.array(CIFAR_MEAN)) / np.array(CIFAR_STD)
    return torch.from_numpy(values.transpose(2, 0, 1))


def test_cifar_evaluation_only_normalises():
    image = noise()
    torch.testing.assert_close(
        cifar_transform(False)(image).double(), normalised(np.asarray(image)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("flip", [True, False])
def test_cifar_training_crops_from_a_reflected_border_and_flips_half(flip: bool):
    image = noise()
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {}
    for top in range(9):
        for left in range(9):
            crop = normalised(padded[top : top + 32, left : left + 32])
            for flipped in (False, True):
                key = torch.round((crop.flip(2) if flipped else crop) * 1000).int().numpy().tobytes()
                crops[key] = (top, left, flipped)
    torch.manual_seed(0)
    transform = cifar_transform(True, flip=flip)
    sampled = [crops[torch.round(transform(image).double() * 1000).int().numpy().tobytes()] for _ in range(300)]
    assert {top for top, _, _ in sampled} == {left for _, left, _ in sampled} == set(range(9))
    assert np.mean([flipped for _, _, flipped in sampled]) == pytest.approx(0.5 if flip else 0, abs=0.1)


@pytest.mark.parametrize("train", [True, False])
def test_images_of_other_sizes_are_brought_to_one(train: bool):
    for size in ((50, 40), (8, 8), (20, 100)):
        assert cifar_transform(train, size=24)(picture(5, size)).shape == (3, 24, 24)
        assert imagenet_transform(train)(picture(5, size)).shape == (3, 224, 224)


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000), (29_999, 2)])
@pytest.mark.parametrize("train", [True, False])
def test_an_image_that_is_very_long_is_quick(size: tuple[int, int], train: bool):
    image = picture(5, size)
    start = time.process_time()
    assert cifar_transform(train)(image).shape == (3, 32, 32)
    assert imagenet_transform(train)(image).shape == (3, 224, 224)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("size", [(800, 16), (16, 801), (801, 16)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_centre_of_a_long_image_is_that_of_the_whole(size: tuple[int, int], as_tensor: bool):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    whole = v2.functional.to_image(image) if as_tensor else image
    expected = v2.functional.center_crop(v2.functional.resize(whole, [256]), [224, 224])
    pixels = imagenet_transform(False, mean=(0, 0, 0), std=(1, 1, 1))(whole)
    expected = v2.functional.to_dtype(v2.functional.to_image(expected), torch.float32, scale=True)
    assert (pixels - expected).abs().max() <= 1.01 / 255


def test_images_of_usual_sides_are_not_cut():
    for size in ((160, 10), (10, 160), (640, 480)):
        image = noise().resize(size)
        assert LimitAspectRatio()(image) is image
    assert LimitAspectRatio()(noise().resize((200, 10))).size == (160, 10)
    assert LimitAspectRatio()(noise().resize((10, 201))).size == (10, 159)


def test_imagenet_evaluation_takes_the_centre_of_256():
    image = noise(256)
    centre = np.asarray(image)[16:240, 16:240]
    pixels = imagenet_transform(False, mean=CIFAR_MEAN, std=CIFAR_STD)(image)
    torch.testing.assert_close(pixels.double(), normalised(centre), rtol=1e-5, atol=1e-5)


def test_imagenet_training_varies_crop_flip_and_colour():
    torch.manual_seed(0)
    grey = PIL.Image.new("RGB", (300, 300), (128, 128, 128))
    sampled = torch.stack([imagenet_transform(True, mean=(0, 0, 0), std=(1, 1, 1))(grey).mean() for _ in range(100)])
    assert sampled.min() < 0.5 * 0.75
    assert sampled.max() > 0.5 * 1.25
    assert sampled.min() >= 0.5 * 0.6 - 0.01
    assert sampled.max() <= 0.5 * 1.4 + 0.01
    half = PIL.Image.new("RGB", (300, 300))
    half.paste((255, 255, 255), (150, 0, 300, 300))
    whites = [imagenet_transform(True)(half).flatten(1).mean().item() for _ in range(20)]
    assert len(set(whites)) > 10
