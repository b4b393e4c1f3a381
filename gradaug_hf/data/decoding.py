"""Images of a split: decoded to RGB and transformed when they are read."""

from collections.abc import Callable
from functools import partial

import numpy as np
import PIL.Image
from datasets import Dataset, Image, IterableDataset

from gradaug_hf.data.columns import classes_of, is_class_label, is_multi_label, multi_hot
from gradaug_hf.data.transforms import Transform

# Images that a stream decodes at a time.
STREAM_BATCH = 16


class UnreadableImageError(ValueError):
    """Say that an image cannot be decoded, with its row and file."""

    def __str__(self) -> str:
        # A worker process of a data loader raises it with its whole traceback as the message.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def with_pixels(split: Dataset | IterableDataset, transform: Transform) -> Dataset | IterableDataset:
    """Decode and transform the images of a split when they are read, so in the workers of a data loader.

    Args:
        split: Data with the columns `image`, `label`, one class or a list of them, and, unless it is a stream, `row`.
        transform: Function of an RGB image that returns a tensor (3, H, W).

    Returns:
        Data whose examples are `pixel_values`, a tensor (3, H, W), and `labels`, an int or, for lists, a multi-hot
        float tensor (classes,). Reading an example raises `UnreadableImageError` with its row where the image cannot
        be decoded.

    Examples:
        >>> split = with_pixels(load_image_data("photos")["train"], cifar_transform(train=True))
        >>> split[0]["pixel_values"].shape, split[0]["labels"]
        (torch.Size([3, 32, 32]), 0)
    """
    read = batch_reader(split, transform)
    if isinstance(split, IterableDataset):
        return split.map(read, batched=True, batch_size=STREAM_BATCH, remove_columns=["image", "label"])
    return split.with_transform(read)


def batch_reader(
    split: Dataset | IterableDataset, transform: Transform
) -> Callable[[dict[str, list]], dict[str, list]]:
    """Return the function with which `with_pixels` decodes and transforms a batch of rows."""
    feature = (split.features or {}).get("label")
    num_classes = classes_of(feature).num_classes if is_multi_label(feature) and is_class_label(feature) else None
    return partial(_read_batch, transform=transform, split=str(split.split), num_classes=num_classes)


def _read_batch(
    batch: dict[str, list], transform: Transform, split: str, num_classes: int | None = None
) -> dict[str, list]:
    rows = batch.get("row", [None] * len(batch["image"]))
    images = (decode(image, row, split) for image, row in zip(batch["image"], rows, strict=True))
    labels = batch["label"] if num_classes is None else multi_hot(batch["label"], num_classes)
    return {"pixel_values": [transform(image) for image in images], "labels": labels}


def decode(encoded: dict | None, row: int | None, split: str) -> PIL.Image.Image:
    """Return an image in RGB.

    Greyscale images of more than 8 bits are scaled by their range: integers up to 255 as they are, up to 65535 from 16
    bits; floats up to 1 from 0..1, up to 255 as they are.

    Args:
        encoded: its `bytes` and `path`, one of which may be None.
        row: its position in the split, for the error; None if it is not known.
        split: name of the split.

    Raises:
        UnreadableImageError: it cannot be decoded, or has values outside of these ranges.
    """
    place = f"split {split}" if row is None else f"row {row} of split {split}"
    if encoded is None:
        raise UnreadableImageError(f"there is no image in {place}")
    try:
        return to_rgb(Image().decode_example(encoded))
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        file = f" ({encoded['path']})" if encoded["path"] else ""
        raise UnreadableImageError(f"the image in {place}{file} cannot be decoded: {error}") from error


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an image in RGB, scaled as `decode` says; raise a ValueError for values in none of its ranges."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # which Pillow clips to 0..255
        image = PIL.Image.fromarray(_to_8_bits(image))
    if image.mode == "P":  # Pillow warns when it drops the transparency of a palette in one go
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_8_bits(image: PIL.Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    is_float = image.mode == "F"
    if not (low >= 0 and high <= (255 if is_float else 65535)):  # or NaN
        accepted = "0..1 or 0..255" if is_float else "0..255 or 0..65535"
        raise ValueError(f"its values are from {low} to {high}; they must be in {accepted}")
    has_16_bits = image.mode.startswith("I;16") or (image.format == "PPM" and not is_float)  # Pillow scales PGM files
    if is_float and high <= 1:
        pixels = pixels * 255
    elif has_16_bits or high > 255:
        pixels = pixels // 256
    return pixels.round().astype(np.uint8)
