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

    Each image that was skipped is warned of, and counted once, in whichever process.

    Args:
        dataset: raises `UnreadableImageError` for such an image.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._skipped = torch.zeros(len(dataset), dtype=torch.int64).share_memory_()

    @property
    def skipped(self) -> torch.Tensor:
        """Return for each image 1 if this process or a worker of it skipped it, else 0."""
        return self._skipped.clone()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        rows = [(index + offset) % len(self) for offset in range(min(len(self), MOST_IN_A_ROW))]
        for row in rows:
            try:
                return self.dataset[row]
            except UnreadableImageError as error:
                if not self._skipped[row]:
                    warnings.warn(f"skipped: {error}", stacklevel=2)
                self._skipped[row] = 1
                last = error
        raise ValueError(f"{len(rows)} images in a row cannot be decoded, the last since {last}")

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]


def readable_images(split: Dataset, num_processes: int | None = None) -> Dataset:
    """Return a split without the images that cannot be decoded, with a warning of each.

    Args:
        split: data with the columns `image` and `row`, as `load_image_data` returns it.
        num_processes: number of processes that decode; None: this one decodes.
    """
    return split.filter(
        _is_readable,
        input_columns=["image", "row"],
        fn_kwargs={"split": str(split.split)},
        num_proc=num_processes,
        desc="Looking for images that cannot be decoded",
    )


def _is_readable(image: dict[str, Any], row: int, split: str) -> bool:
    try:
        decode(image, row, split)
    except UnreadableImageError as error:
        warnings.warn(f"skipped: {error}", stacklevel=2)
        return False
    return True
