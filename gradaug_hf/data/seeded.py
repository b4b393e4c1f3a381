"""Datasets whose random augmentation is a function of seed, epoch and image, for runs that can be repeated.

A resumed training reads an image in another worker process, or after others, than the training that it continues
would have. The global random numbers, which a transform samples, would then differ.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradaug_hf.utils.randomness import random_states_kept, seed_everything


class Seeds:
    """Give the examples of an epoch their seeds; worker processes that are kept from epoch to epoch see it change."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def of(self, example: Any) -> int:
        return zlib.crc32(f"{self._seed} {self.epoch} {example}".encode())


class DatasetWrapper:
    """Pass on the classes and the split of a dataset, `dataset`, that another one wraps."""

    dataset: Any
    # Of a dataset of the `datasets` library, of one of torchvision, for example, or None.
    features = property(lambda self: getattr(self.dataset, "features", None))
    classes = property(lambda self: getattr(self.dataset, "classes", None))
    split = property(lambda self: getattr(self.dataset, "split", None))


class _SeededWrapper(DatasetWrapper):
    """Hold a dataset, and the seeds for the reading of its examples."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self._seeds = Seeds(seed)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, here and in the worker processes that read the dataset."""
        self._seeds.set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class SeededDataset(_SeededWrapper, Dataset):
    """Make the random numbers of Python, NumPy and torch in each example a function of seed, epoch and its index.

    The global random numbers stay as they are. `GradAugTrainer` sets the epoch.

    Args:
        dataset: has `__getitem__` and `__len__`, and samples random numbers when an example is read.
        seed: any integer.

    Examples:
        >>> photos = with_pixels(load_image_data("photos")["train"], cifar_transform(train=True))
        >>> dataset = SeededDataset(photos, seed=0)
        >>> torch.equal(dataset[0]["pixel_values"], dataset[0]["pixel_values"])
        True
    """

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        with random_states_kept():
            return [self._read(index) for index in indices]

    def _read(self, index: int) -> Any:
        seed_everything(self._seeds.of(index))
        return self.dataset[index]


class SeededStream(_SeededWrapper, IterableDataset):
    """Make the random numbers in each example of a stream a function of seed, epoch and its position in this process.

    Args:
        dataset: an iterable, which is told the epoch if it has `set_epoch`.
        seed: any integer.

    Examples:
        >>> photos = with_pixels(load_image_data("photos")["train"], cifar_transform(train=True))
        >>> len(list(SeededStream(photos, seed=0)))
        4
    """

    def __iter__(self) -> Iterator[Any]:
        examples, position, end = iter(self.dataset), 0, object()
        while True:
            with random_states_kept():
                seed_everything(self._seeds.of(position))
                example = next(examples, end)
            if example is end:
                return
            yield example
            position += 1


class EpochCallback(TrainerCallback):
    """Tell the training set the epoch, where it has `set_epoch`: accelerate does so only if it finds no sampler."""

    def __init__(self) -> None:
        self._epoch = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start where a resumed training starts."""
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch before the data loader starts to read."""
        dataset = getattr(kwargs["train_dataloader"], "dataset", None)  # a loader of the user's may have none
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self._epoch)
        self._epoch += 1
