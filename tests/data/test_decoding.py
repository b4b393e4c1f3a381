import io
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch.utils.data import DataLoader

from gradaug_hf.data.decoding import UnreadableImageError, decode, with_pixels
from gradaug_hf.data.digits import load_digits_data
from gradaug_hf.data.transforms import cifar_transform
from tests.helpers.pictures import noise, picture, png


def mixed_modes() -> list[tuple[PIL.Image.Image, str, tuple[int, int, int]]]:
    """Images, a file format that keeps their mode, and the colour they show."""
    grey16 = PIL.Image.fromarray(np.full((12, 12), 100 * 256 + 17, dtype=np.uint16))
    palette = PIL.Image.new("P", (12, 12))
    palette.putpalette([200, 100, 50] + [0] * 765)
    return [
        (PIL.Image.new("L", (12, 12), 80), "PNG", (80, 80, 80)),
        (PIL.Image.new("1", (12, 12), 1), "PNG", (255, 255, 255)),
        (grey16, "PNG", (100, 100, 100)),
        (palette, "PNG", (200, 100, 50)),
        (PIL.Image.new("CMYK", (12, 12), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (PIL.Image.new("RGBA", (12, 12), (10, 20, 30, 128)), "PNG", (10, 20, 30)),
        (PIL.Image.new("LA", (12, 12), (40, 128)), "PNG", (40, 40, 40)),
    ]


def encoded_dataset(encoded: list[bytes]) -> Dataset:
    features = Features({"image": Image(decode=False), "label": ClassLabel(num_classes=2), "row": Value("int64")})
    columns = {
        "image": [{"bytes": image, "path": None} for image in encoded],
        "label": [0] * len(encoded),
        "row": list(range(100, 100 + len(encoded))),
    }
    return Dataset.from_dict(columns, features=features, split="train")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("image", "file_format", "colour"), mixed_modes(), ids=lambda value: getattr(value, "mode", "")
)
def test_every_image_mode_becomes_rgb(image: PIL.Image.Image, file_format: str, colour: tuple[int, int, int]):
    file = io.BytesIO()
    image.save(file, file_format)
    transform = cifar_transform(False, size=12, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = with_pixels(encoded_dataset([file.getvalue()]), transform)[0]["pixel_values"]
    assert pixels.shape == (3, 12, 12)
    assert (pixels[:, 5, 5] * 255).round().int().tolist() == list(colour)


def tiff(values: list, dtype: type) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.array(values, dtype=dtype).repeat(4, 0).repeat(4, 1)).save(file, "TIFF")
    return file.getvalue()


def pgm(values: list[int], largest: int) -> bytes:
    kind = ">u2" if largest > 255 else "u1"
    return b"P5 2 1 %d\n" % largest + np.array(values, dtype=kind).tobytes()


@pytest.mark.parametrize(
    ("encoded", "colours"),
    [
        (tiff([[0.0, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (tiff([[0.0, 51.0, 254.6]], np.float32), [0, 51, 255]),
        (tiff([[0, 51, 255]], np.int32), [0, 51, 255]),
        (tiff([[0, 51 * 256, 65535]], np.int32), [0, 51, 255]),
        (tiff([[0, 51 * 256, 65535]], np.uint16), [0, 51, 255]),
        (tiff([[0, 200, 255]], np.uint16), [0, 0, 0]),
        (pgm([0, 51 * 256], 65535), [0, 51]),
        (pgm([0, 255], 65535), [0, 0]),
        (pgm([0, 3], 15), [0, 51]),
    ],
)
def test_images_of_more_bits_are_scaled_by_their_range(encoded: bytes, colours: list[int]):
    image = decode({"bytes": encoded, "path": None}, 0, "train")
    step = image.width // len(colours)
    assert [image.getpixel((step * i, 0)) for i in range(len(colours))] == [(colour,) * 3 for colour in colours]


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (tiff([[0.5, float("nan")]], np.float32), "its values are from nan to nan; they must be in 0..1 or 0..255"),
        (tiff([[0.5, float("inf")]], np.float32), "its values are from 0.5 to inf"),
        (tiff([[-0.5, 0.5]], np.float32), "its values are from -0.5 to 0.5"),
        (tiff([[0.0, 255.5]], np.float32), "its values are from 0.0 to 255.5"),
        (tiff([[0, 65536]], np.int32), "its values are from 0 to 65536; they must be in 0..255 or 0..65535"),
        (tiff([[-1, 5]], np.int32), "its values are from -1 to 5"),
    ],
)
def test_values_of_no_known_range_are_refused_with_row_and_file(encoded: bytes, message: str):
    with pytest.raises(UnreadableImageError, match=rf"row 3 of split train \(a.tif\) cannot be decoded: {message}"):
        decode({"bytes": encoded, "path": "a.tif"}, 3, "train")


@pytest.mark.filterwarnings("error")
def test_transparent_palette_becomes_rgb():
    image = PIL.Image.new("P", (12, 12))
    image.putpalette([200, 100, 50] + [0] * 765)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(256))
    transform = cifar_transform(False, size=12, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = with_pixels(encoded_dataset([file.getvalue()]), transform)[0]["pixel_values"]
    assert (pixels[:, 5, 5] * 255).round().int().tolist() == [200, 100, 50]


@pytest.mark.parametrize("broken", [b"not an image", png(noise())[:200], b""], ids=["text", "truncated", "empty"])
def test_image_that_cannot_be_decoded_is_named_by_its_row(broken: bytes):
    split = with_pixels(encoded_dataset([png(picture(1)), png(picture(2)), broken]), cifar_transform(False))
    with pytest.raises(ValueError, match="the image in row 102 of split train cannot be decoded"):
        list(split.select([1, 2]))


def test_images_are_decoded_in_the_workers():
    split = with_pixels(encoded_dataset([png(picture(1)), b"not an image"]), cifar_transform(False))
    batches = iter(DataLoader(split, batch_size=1, num_workers=1))
    assert next(batches)["pixel_values"].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="^the image in row 101 of split train") as raised:
        next(batches)
    assert "in DataLoader worker process 0" in raised.value.args[0]


def test_missing_image_is_named_by_its_row():
    features = Features({"image": Image(decode=False), "label": ClassLabel(num_classes=2), "row": Value("int64")})
    split = Dataset.from_dict({"image": [None], "label": [0], "row": [4]}, features=features, split="train")
    with pytest.raises(ValueError, match="there is no image in row 4 of split train"):
        with_pixels(split, cifar_transform(False))[0]


def test_data_can_be_sent_to_a_spawned_worker():
    split = with_pixels(load_digits_data()["eval"].select(range(4)), cifar_transform(False))
    sent = pickle.loads(pickle.dumps(split))
    for here, there in zip(split, sent, strict=True):
        assert torch.equal(here["pixel_values"], there["pixel_values"])
