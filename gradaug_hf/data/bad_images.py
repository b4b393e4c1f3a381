"""Images that cannot be decoded: skipped and counted, where that is asked for."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from gradaug_hf.data.decoding import UnreadableImageError, decode
from gradaug_hf.data.seeded import DatasetWrapper

# Images in a row that cannot be decoded, after which something else is wrong than some of the images.
MOST_IN_A_ROW = 100


class SkippingDataset(DatasetWrapper, TorchDataset):
    """Replace images that cannot be decoded by the next one of the dataset, so that batches keep their size.

    The dataset raises `UnreadableImageError` for them. Each is warned of, and is 1 in `skipped`, where this process or
    one of its workers skipped it.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.skipped = torch.zeros(len(dataset), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        rows = [(index + offset) % len(self) for offset in range(min(len(self), MOST_IN_A_ROW))]
        for row in rows:
            try:
                return self.dataset[row]
            except UnreadableImageError as error:
                if not self.skipped[row]:
                    warnings.warn(f"skipped: {error}", stacklevel=2)
                self.skipped[row] = 1
                last = error
        raise ValueError(f"{len(rows)} images in a row cannot be decoded, the last since {last}")

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]


def readable_images(split: Dataset) -> Dataset:
    """Return a split of `load_image_data` without the images that cannot be decoded, with a warning of each."""
    return split.filter(
        _is_readable,
        input_columns=["image", "row"],
        fn_kwargs={"split": str(split.split)},
        desc="Looking for images that cannot be decoded",
    )


def _is_readable(image: dict[str, Any], row: int, split: str) -> bool:
    try:
        decode(image, row, split)
    except UnreadableImageError as error:
        warnings.warn(f"skipped: {error}", stacklevel=2)
        return False
    return True
