"""Small images, datasets of them, and what a plot is drawn with."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image


def picture(value: int, size: tuple[int, int] = (12, 10)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, (value, value // 2, 255 - value))


def noise(size: int = 32) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def dataset(labels: list, label=None, image_column: str = "img", label_column: str = "label") -> Dataset:
    label = ClassLabel(names=["ant", "bee"]) if label is None else label
    images = [picture(10 * index) for index in range(len(labels))]
    features = Features({image_column: Image(), label_column: label})
    return Dataset.from_dict({image_column: images, label_column: labels}, features=features)


def pixels_of_each_grey(plot: Path) -> dict[int, int]:
    """Number of pixels of each shade in a plot, which has no colours."""
    with PIL.Image.open(plot) as image:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    assert np.array_equal(red, green) and np.array_equal(red, blue)
    return dict(zip(*(each.tolist() for each in np.unique(red, return_counts=True)), strict=True))
