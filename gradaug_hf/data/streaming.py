"""Streams of shards that several processes and workers divide, so that an epoch has every image once.

An epoch is one order of all images: shard after shard, in an order sampled anew for each epoch, and in each shard row
after row. Each process has an equal piece of it, and each worker whole batches of that. So shards may differ in size,
a shard at the end of a piece is read by two workers, and no process waits for one with more batches. Within the piece
of a worker images are shuffled by a buffer. Its order follows from numbers alone, so that a resumed training starts
amid an epoch without decoding what it has seen.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from gradaug_hf.data.seeded import DatasetWrapper, Seeds
from gradaug_hf.data.transforms import Transform
from gradaug_hf.utils.randomness import random_states_kept, seed_everything

if TYPE_CHECKING:
    from datasets import IterableDataset as Stream

# Rows of a shard that are read at a time.
ROWS = 16
# In place of an image that a resumed training has seen.
SEEN = None
# An epoch, and batches of it.
NOTHING_SKIPPED = (-1, 0)


class ShardedStream(DatasetWrapper, IterableDataset):
    """Give each process and each worker its images of every epoch, decoded, transformed and shuffled.

    The random numbers in each example are a function of the seed, the epoch and the place of the image, as those of
    `SeededDataset` are.

    Args:
        stream: has the columns `image` (encoded) and `label`, and is not shuffled.
        lengths: numbers of images in its shards.
        transform: function of an RGB image that returns a tensor (3, H, W).
        batch_size: images in a batch of one process.
        seed: of order and augmentation.
        buffer_size: images that a worker holds in memory to shuffle them, still encoded.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        stream: "Stream",
        lengths: Sequence[int],
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        buffer_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        from gradaug_hf.data.decoding import batch_reader  # imports `datasets`, which the trainer alone does without

        self.dataset = stream
        self._lengths = list(lengths)
        self._read = batch_reader(stream, transform)
        self._batch_size, self._seed, self._buffer_size = batch_size, seed, buffer_size
        self._length = -(-sum(lengths) // world_size)
        self._start = rank * self._length
        self._seeds = Seeds(seed)
        self._skipped = torch.tensor(NOTHING_SKIPPED).share_memory_()

    def __len__(self) -> int:
        """Return the number of images that this process has in an epoch; the last process may see some twice."""
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, here and in the worker processes that read the stream."""
        self._seeds.set_epoch(epoch)

    def skip(self, epoch: int, batches: int) -> None:
        """Give `SEEN` for each image of the first batches of an epoch, those before a resume, without reading it."""
        self._skipped.copy_(torch.tensor([epoch, batches]))

    def undivided(self) -> "ShardedStream":
        """Return the first epoch as one process alone reads it, from its beginning."""
        whole = copy(self)
        whole._start, whole._length = 0, sum(self._lengths)
        whole._seeds, whole._skipped = Seeds(self._seed), torch.tensor(NOTHING_SKIPPED)
        return whole

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch = self._seeds.epoch
        skipped_epoch, skipped_batches = self._skipped.tolist()
        first, last = self._piece(index, workers)
        seen = 0
        if epoch == skipped_epoch:
            seen = min(_share(skipped_batches, index, workers) * self._batch_size, last - first)
        yield from (SEEN for _ in range(seen))
        generator = random.Random(f"{self._seed} {epoch} {first}")
        order = buffered_order(last - first, self._buffer_size, generator)[seen:]
        for place, row in _taken(self._rows(epoch, first, last, min(order, default=0)), order):
            with random_states_kept():
                seed_everything(self._seeds.of(first + place))
                read = self._read({name: [value] for name, value in row.items()})
            yield {name: values[0] for name, values in read.items()}

    def _piece(self, index: int, workers: int) -> tuple[int, int]:
        """Return where the images of a worker begin and end: whole batches, which the loader takes turn by turn."""
        batches = -(-self._length // self._batch_size)
        sizes = [_share(batches, other, workers) * self._batch_size for other in range(index + 1)]
        if index >= (last := (batches - 1) % workers):  # whose last batch, the epoch's, may be smaller
            sizes[last] -= batches * self._batch_size - self._length
        return self._start + sum(sizes[:-1]), self._start + sum(sizes)

    def _rows(self, epoch: int, first: int, last: int, unread: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield place and content of the rows of a piece of an epoch, from the first that is needed on."""
        shards = list(range(len(self._lengths)))
        random.Random(f"{self._seed} {epoch}").shuffle(shards)
        ends = list(accumulate(self._lengths[shard] for shard in shards))
        place = first + unread
        while place < last:
            within = place % ends[-1]  # the last process goes on with the first images
            number = bisect_right(ends, within)
            start = within - (ends[number] - self._lengths[shards[number]])
            stop = min(self._lengths[shards[number]], start + last - place)
            for row in islice(self._shard(shards[number]), start, stop):
                yield place - first, row
                place += 1

    def _shard(self, number: int) -> Iterator[dict[str, Any]]:
        # Not `iter(shard)`, which would divide the shard among the workers once more.
        for batch in self.dataset.shard(len(self._lengths), number).iter(ROWS):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


def _share(batches: int, index: int, workers: int) -> int:
    """Return how many of the first batches, which workers give in turn, are one worker's."""
    return max(0, -(-(batches - index) // workers))


def buffered_order(count: int, size: int, generator: random.Random) -> list[int]:
    """Return the order in which a buffer of a size, filled from a sequence of so many, gives its elements at random.

    A buffer of one element gives the sequence as it is.

    Examples:
        >>> sorted(buffered_order(5, 3, random.Random(0)))
        [0, 1, 2, 3, 4]
    """
    held = list(range(min(max(1, size), count)))
    order = []
    for place in range(len(held), count):
        slot = generator.randrange(len(held))
        order.append(held[slot])
        held[slot] = place
    generator.shuffle(held)
    return order + held


def _taken(rows: Iterator[tuple[int, Any]], order: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Yield rows in an order of their places; those that are not in it are passed over."""
    wanted, held = set(order), {}
    for place in order:
        while place not in held:
            found, row = next(rows)
            if found in wanted:
                held[found] = row
        yield place, held.pop(place)
