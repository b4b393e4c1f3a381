"""scikit-learn's handwritten digits, which need no download."""

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from gradaug_hf.data.columns import standard_columns


def load_digits_data(size: int = 32) -> DatasetDict:
    """Load scikit-learn's 1,797 handwritten digits, in the form of `load_image_data`.

    The first half is for training and the second for evaluation, as in scikit-learn's own example.

    Args:
        size: Side in pixels to which the 8x8 images are enlarged.

    Returns:
        Splits `train` and `eval` with the columns `image`, `label` and `row`.

    Examples:
        >>> data = load_digits_data(size=8)
        >>> len(data["train"]), len(data["eval"])
        (898, 899)
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = [
        PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BICUBIC).convert("RGB")
        for image in pixels
    ]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    half = len(images) // 2
    splits = {
        split: Dataset.from_dict({"image": images[rows], "label": digits.target[rows]}, features, split=split)
        for split, rows in (("train", slice(half)), ("eval", slice(half, None)))
    }
    return standard_columns(DatasetDict(splits), "image", "label")
