import sys
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from gradaug_hf.experiments.evaluation.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    CorruptedImages,
    check_corruptions,
    corrupt_image,
)

GREY = torch.full((3, 64, 64), 128, dtype=torch.uint8)
PHOTO = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8))
# From ImageNet-C's program, by hand: severities 1 to 5.
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation
PHOTONS = (60, 25, 12, 5, 3)  # of a white pixel
IMPULSES = (0.03, 0.06, 0.09, 0.17, 0.27)  # share of the values
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # factor
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of HSV
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # of the side
JPEG = (25, 18, 15, 10, 7)  # quality
ZOOM = (1.1, 1.15, 1.2, 1.24, 1.3)  # the largest


def corrupted(name: str, severity: int, pixels: Tensor = GREY, seed: int = 0) -> np.ndarray:
    return corrupt_image(pixels, name, severity, seed).numpy().astype(float) / 255


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noises_have_the_strength_of_imagenet_c(severity: int):
    grey = 128 / 255
    noise = NOISE[severity - 1]
    normal = np.clip(grey + noise * np.random.default_rng(1).standard_normal(10**6), 0, 1).std()
    assert corrupted("gaussian_noise", severity).std() == pytest.approx(normal, rel=0.03)

    photons = PHOTONS[severity - 1]
    counts = np.random.default_rng(1).poisson(photons * grey, 10**6)
    poisson = np.clip(counts / photons, 0, 1)
    found = corrupted("shot_noise", severity)
    assert found.std() == pytest.approx(poisson.std(), rel=0.03)
    assert found.mean() == pytest.approx(poisson.mean(), abs=0.01)

    found = corrupted("impulse_noise", severity)
    changed = found != grey
    assert set(np.unique(found[changed])) == {0.0, 1.0}
    assert changed.mean() == pytest.approx(IMPULSES[severity - 1], abs=0.012)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_digital_corruptions_are_those_of_imagenet_c(severity: int):
    one = 1 / 255
    pixels = PHOTO.double().numpy() / 255
    mean = pixels.mean((1, 2), keepdims=True)
    contrast = np.clip((pixels - mean) * CONTRAST[severity - 1] + mean, 0, 1)
    np.testing.assert_allclose(corrupted("contrast", severity, PHOTO), contrast, atol=one)

    # A grey of HSV value v has the value v + 0.1, and so on.
    expected = min(128 / 255 + BRIGHTNESS[severity - 1], 1)
    np.testing.assert_allclose(corrupted("brightness", severity), expected, atol=one)

    image = PIL.Image.fromarray(PHOTO.permute(1, 2, 0).numpy())
    small = image.resize((int(32 * PIXELATE[severity - 1]),) * 2, PIL.Image.BOX)
    big = np.asarray(small.resize((32, 32), PIL.Image.BOX)).transpose(2, 0, 1)
    if severity in (2, 5):  # whole multiples, for which one way of enlarging is like another
        assert np.array_equal(corrupt_image(PHOTO, "pixelate", severity, 0).numpy(), big)
    file = BytesIO()
    image.save(file, "JPEG", quality=JPEG[severity - 1])
    jpeg = np.asarray(PIL.Image.open(file)).transpose(2, 0, 1)
    assert np.array_equal(corrupt_image(PHOTO, "jpeg_compression", severity, 0).numpy(), jpeg)


@pytest.mark.parametrize(("severity", "radius"), [(1, 3), (2, 4), (3, 6)])  # a larger disk is too faint for 8 bits
def test_defocus_blur_spreads_a_point_over_a_disk_of_imagenet_c_s_radius(severity: int, radius: int):
    point = torch.zeros(3, 64, 64, dtype=torch.uint8)
    point[:, 32, 32] = 255
    spread = corrupted("defocus_blur", severity, point)[0]
    y, x = np.mgrid[-32:32, -32:32]
    inside = x**2 + y**2 <= radius**2
    # The anti-aliased rim is left out on both sides.
    assert spread[x**2 + y**2 <= (radius - 1.5) ** 2].min() >= 0.8 / inside.sum() - 1 / 255
    assert spread[x**2 + y**2 >= (radius + 1.5) ** 2].max() == 0


@pytest.mark.parametrize(("severity", "zoom"), list(zip(SEVERITIES, ZOOM, strict=True)))
def test_zoom_blur_is_a_mean_up_to_imagenet_c_s_largest_zoom(severity: int, zoom: float):
    square = torch.zeros(3, 64, 64, dtype=torch.uint8)
    square[:, 24:40, 24:40] = 255
    row = corrupted("zoom_blur", severity, square)[0, 32]
    reached = np.flatnonzero(row > 0.01)
    assert (reached[-1] - reached[0] + 1) / 16 == pytest.approx(zoom, abs=0.2)
    assert row[32] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_corruption_changes_the_image_more_with_its_severity_and_follows_from_the_seed(name: str):
    generator = np.random.default_rng(3)
    coarse = PIL.Image.fromarray(generator.integers(60, 190, (6, 6, 3), dtype=np.uint8))
    smooth = torch.from_numpy(np.asarray(coarse.resize((48, 48), PIL.Image.BICUBIC)).copy()).permute(2, 0, 1)
    clean = smooth.numpy() / 255
    weakest, strongest = (
        np.mean([np.abs(corrupted(name, severity, smooth, seed) - clean).mean() for seed in range(4)])
        for severity in (1, 5)
    )
    assert 0 < weakest < strongest
    once, again, other = (corrupt_image(smooth, name, 3, seed) for seed in (5, 5, 6))
    assert once.shape == smooth.shape and once.dtype == torch.uint8
    assert torch.equal(once, again)
    sampled = not torch.equal(once, other)
    without_chance = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert sampled == (name not in without_chance)


def test_the_global_random_numbers_are_left_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    expected = np.random.rand(), torch.rand(()).item()
    np.random.seed(0)
    torch.manual_seed(0)
    corrupt_image(PHOTO, "gaussian_noise", 1, seed=9)
    corrupt_image(PHOTO, "glass_blur", 1, seed=9)
    assert (np.random.rand(), torch.rand(()).item()) == expected


def test_an_image_is_corrupted_alike_in_any_order_and_unlike_others():
    images = [{"pixel_values": GREY, "labels": label} for label in (4, 7)]
    first = CorruptedImages(images, "gaussian_noise", 1, seed=0)
    second = CorruptedImages(images, "gaussian_noise", 1, seed=0)
    last_first = second[1]["pixel_values"]
    assert torch.equal(first[0]["pixel_values"], second[0]["pixel_values"])
    assert torch.equal(first[1]["pixel_values"], last_first)
    assert not torch.equal(first[0]["pixel_values"], first[1]["pixel_values"])
    others = [CorruptedImages(images, "gaussian_noise", 1, seed=1), CorruptedImages(images, "shot_noise", 1, seed=0)]
    assert all(not torch.equal(first[0]["pixel_values"], other[0]["pixel_values"]) for other in others)
    assert [first[index]["labels"] for index in range(len(first))] == [4, 7]


def test_images_of_less_than_32_pixels_are_refused():
    check_corruptions(32)
    with pytest.raises(ValueError, match="image_size is 28; the corruptions need at least 32 pixels"):
        check_corruptions(28)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ValueError, match=r"pip install 'gradaug_hf\[robustness\]'"):
        check_corruptions(32)


@pytest.mark.parametrize("side", [32, pytest.param(224, marks=pytest.mark.slow)])
def test_all_severities_run_at_usual_sizes(side: int):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8))
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            assert corrupt_image(pixels, name, severity, seed=0).shape == pixels.shape, (name, severity)
