"""Data whose random augmentation is a function of seed, epoch and image, so that an interrupted run can be repeated.

A resumed training reads the images that are left in another worker process, or after others, than the training that
it continues would have. What a transform draws from the global random numbers would then differ.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradaug_hf.utils.randomness import random_states_kept, seed_everything


class _Seeds:
    """Seeds of the examples of an epoch; worker processes that are kept from epoch to epoch see it change."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def of(self, example: Any) -> int:
        return zlib.crc32(f"{self._seed} {int(self._epoch)} {example}".encode())


class DatasetWrapper:
    """What a data set around another one, `dataset`, says of the classes."""

    dataset: Any

    @property
    def features(self) -> Any:
        """Those of a data set of the `datasets` library, else None."""
        return getattr(self.dataset, "features", None)

    @property
    def classes(self) -> Any:
        """Names of the classes, of a data set of torchvision for example, else None."""
        return getattr(self.dataset, "classes", None)


class _SeededWrapper(DatasetWrapper):
    """A data set, and the seeds of what is drawn when its examples are read."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self._seeds = _Seeds(seed)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, here and in the worker processes that read the data set."""
        self._seeds.set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class SeededDataset(_SeededWrapper, Dataset):
    """A data set of which each example draws from Python, NumPy and torch what seed, epoch and its index say.

    The global random numbers stay as they are. `GradAugTrainer` sets the epoch.

    Args:
        dataset: has `__getitem__` and `__len__`, and draws random numbers when an example is read.
        seed: any integer.
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
    """`SeededDataset` for a stream, by the position of an example in what its process reads.

    Args:
        dataset: an iterable, which is told the epoch if it has `set_epoch`.
        seed: any integer.
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
    """Tells the training set the epoch, where it has `set_epoch`: accelerate does so only if it finds no sampler."""

    def __init__(self) -> None:
        self._epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start where a resumed training starts."""
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch before the data loader starts to read."""
        dataset = kwargs["train_dataloader"].dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self._epoch)
        self._epoch += 1
