import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from gradaug_hf.data.seeded import SeededDataset, SeededStream


def samples() -> list[float]:
    return [random.random(), np.random.random(), torch.rand(()).item()]


class Noise(Dataset):
    features, classes = {"label": "of the data set"}, ["one", "two"]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, *samples()], dtype=torch.float64)


class Stream(IterableDataset):
    def __init__(self) -> None:
        self.epoch = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return (torch.tensor([index, *samples()], dtype=torch.float64) for index in range(12))


def read(dataset: Dataset, indices: list[int] | None = None, workers: int = 0) -> torch.Tensor:
    loader = DataLoader(dataset, 3, sampler=indices, num_workers=workers)
    batches = torch.cat(list(loader))
    return batches[batches[:, 0].argsort()]


def test_an_example_depends_on_seed_epoch_and_index_alone():
    data = SeededDataset(Noise(), 5)
    first = read(data)
    assert len(set(first[:, 1:].flatten().tolist())) == 36
    random.seed(0)
    assert torch.equal(read(data, list(range(11, -1, -1))), first)
    assert torch.equal(read(data, workers=2), first)
    assert torch.equal(torch.stack([data[index] for index in range(12)]), first)
    assert torch.equal(read(SeededDataset(Noise(), 5)), first)
    assert not (read(SeededDataset(Noise(), 6))[:, 1:] == first[:, 1:]).any()
    data.set_epoch(1)
    assert not (read(data)[:, 1:] == first[:, 1:]).any()
    data.set_epoch(0)
    assert torch.equal(read(data), first)


@pytest.mark.parametrize("make", [lambda: SeededDataset(Noise(), 5), lambda: SeededStream(Stream(), 5)])
def test_global_random_numbers_neither_matter_nor_change(make):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = samples()
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        data = make()
        examples = data if isinstance(data, SeededStream) else (data[index] for index in range(12))
        states.append(torch.stack(list(examples)))
        assert samples() == before
    assert torch.equal(*states)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_epoch_change(persistent):
    data = SeededDataset(Noise(), 5)
    loader = DataLoader(data, 3, num_workers=2, persistent_workers=persistent)
    for epoch in range(3):
        data.set_epoch(epoch)
        expected = SeededDataset(Noise(), 5)
        expected.set_epoch(epoch)
        assert torch.equal(torch.cat(list(loader)), read(expected))


def test_a_stream_depends_on_seed_epoch_and_position_alone():
    stream = SeededStream(Stream(), 5)
    stream.set_epoch(2)
    assert stream.dataset.epoch == 2
    first = torch.stack(list(stream))
    assert len(set(first[:, 1:].flatten().tolist())) == 36
    assert torch.equal(torch.stack(list(stream)), first)
    stream.set_epoch(3)
    assert not (torch.stack(list(stream))[:, 1:] == first[:, 1:]).any()


def test_classes_are_those_of_the_data():
    assert SeededDataset(Noise(), 5).features == Noise.features
    assert SeededDataset(Noise(), 5).classes == Noise.classes
    assert SeededDataset([1], 5).features is None
    assert SeededDataset([1], 5).classes is None
