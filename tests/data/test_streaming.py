import json
import random
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import HfApi
from torch import Tensor
from torch.utils.data import DataLoader

from gradaug_hf.data.class_map import read_class_map
from gradaug_hf.data.loading import class_names, load_image_data, number_of_images, stream_image_data
from gradaug_hf.data.shards import shard_lengths
from gradaug_hf.data.streaming import SEEN, ShardedStream, buffered_order
from tests.helpers.shards import NAMES, numbered_image, write_parquet, write_shards, write_tar

EVEN, UNEVEN = [4] * 8, [5, 3, 1, 7, 6, 2, 9, 7]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def number(image: PIL.Image.Image) -> Tensor:
    """The number of an image, and a random one."""
    return torch.tensor([float(np.asarray(image)[0, 0, 0]), random.random()])


def stream_of(folder: Path, rank: int = 0, world_size: int = 1, **settings) -> ShardedStream:
    split = stream_image_data(str(folder), class_map=str(folder / "classes.txt"))["train"]
    values = {"batch_size": 4, "seed": 1, "buffer_size": 6, **settings}
    return ShardedStream(split, shard_lengths(split), number, rank=rank, world_size=world_size, **values)


def epoch_of(stream: ShardedStream, workers: int, epoch: int = 0) -> list[list]:
    stream.set_epoch(epoch)

    def collate(examples: list) -> list:
        return [SEEN if e is SEEN else (*e["pixel_values"].tolist(), e["labels"]) for e in examples]

    return list(DataLoader(stream, 4, num_workers=workers, collate_fn=collate))


MORE = [("parquet", EVEN, 2, 2), ("parquet", UNEVEN, 1, 0), ("tar", UNEVEN, 4, 3)]


@pytest.mark.parametrize(
    ("kind", "lengths", "processes", "workers"),
    [
        ("tar", UNEVEN, 2, 2),
        ("parquet", UNEVEN, 2, 2),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE),
    ],
)
def test_processes_and_workers_see_each_image_of_an_epoch_exactly_once(tmp_path, kind, lengths, processes, workers):
    folder = write_shards(tmp_path, lengths, kind)
    orders = []
    for epoch in (0, 1):
        batches = [epoch_of(stream_of(folder, rank, processes), workers, epoch) for rank in range(processes)]
        assert len({len(each) for each in batches}) == 1
        seen = [example for each in batches for batch in each for example in batch]
        assert sorted(int(red) for red, *_ in seen) == list(range(sum(lengths)))
        assert all(label == red % 3 for red, _, label in seen)
        orders.append([red for red, *_ in seen])
    assert orders[0] != orders[1] != sorted(orders[1])


def test_images_that_do_not_divide_are_filled_up_with_the_first_of_the_epoch(tmp_path):
    folder = write_shards(tmp_path, [5, 2, 4])
    streams = [stream_of(folder, rank, 3) for rank in range(3)]
    assert [len(stream) for stream in streams] == [4, 4, 4]
    seen = [int(red) for stream in streams for batch in epoch_of(stream, 0) for red, *_ in batch]
    assert len(seen) == 12
    assert set(seen) == set(range(11))


@pytest.mark.parametrize("workers", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stream_goes_on_amid_an_epoch_as_if_it_had_not_been_left(tmp_path, workers):
    stream = stream_of(write_shards(tmp_path, UNEVEN), 1, 2)
    whole, following = epoch_of(stream, workers, 3), epoch_of(stream, workers, 4)
    for batches in (1, 3, 5):
        stream.skip(3, batches)
        found = epoch_of(stream, workers, 3)
        assert found[batches:] == whole[batches:]
        assert all(example is SEEN for batch in found[:batches] for example in batch)
        assert epoch_of(stream, workers, 4) == following


def test_an_undivided_stream_is_the_same_in_all_processes_wherever_they_are(tmp_path):
    folder = write_shards(tmp_path, UNEVEN)
    streams = [stream_of(folder, rank, 2) for rank in range(2)]
    streams[0].skip(0, 2)
    streams[1].set_epoch(3)
    first, second = (list(stream.undivided()) for stream in streams)
    reds = [[example["pixel_values"][0].item() for example in each] for each in (first, second)]
    assert reds[0] == reds[1]
    assert sorted(reds[0]) == list(range(sum(UNEVEN)))


def test_what_was_seen_is_neither_decoded_nor_transformed(tmp_path):
    decoded = []
    stream = stream_of(write_shards(tmp_path, UNEVEN))
    stream._read.keywords["transform"] = lambda image: decoded.append(image) or number(image)
    stream.skip(0, 9)
    left = [example for batch in epoch_of(stream, 0)[9:] for example in batch]
    assert len(decoded) == len(left) == 4


def test_a_buffer_shuffles_within_its_reach_and_one_of_an_image_not_at_all():
    order = buffered_order(1000, 50, random.Random(0))
    assert sorted(order) == list(range(1000))
    assert min(at - place for place, at in enumerate(order)) < -50
    assert max(at - place for place, at in enumerate(order)) < 50
    assert buffered_order(9, 1, random.Random(0)) == list(range(9))
    assert buffered_order(0, 5, random.Random(0)) == []


def test_archives_are_counted_once_or_not_at_all_where_a_file_says_what_they_hold(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, UNEVEN)
    stream = stream_image_data(str(folder), class_map=str(folder / "classes.txt"))
    assert shard_lengths(stream["train"]) == UNEVEN
    assert number_of_images(stream["train"]) == sum(UNEVEN)
    assert shard_lengths(stream["eval"]) == [3]
    assert shard_lengths(stream["train"].take(3)) in (None, UNEVEN)
    monkeypatch.setattr("gradaug_hf.data.shards.count_samples", None)
    assert shard_lengths(stream_image_data(str(folder), class_map=str(folder / "classes.txt"))["train"]) == UNEVEN
    stated = {f"train-{shard:04d}.tar": length + 1 for shard, length in enumerate(UNEVEN)}
    files = {"train": {"filenames": list(stated), "shard_lengths": list(stated.values())}}
    (folder / "_info.json").write_text(json.dumps({"splits": files}))
    again = stream_image_data(str(folder), class_map=str(folder / "classes.txt"))
    assert shard_lengths(again["train"]) == list(stated.values())


def test_streams_and_loaded_archives_are_alike(tmp_path):
    folder = write_shards(tmp_path, [3, 4])
    loaded = load_image_data(str(folder), class_map=str(folder / "classes.txt"))
    stream = stream_image_data(str(folder), class_map=str(folder / "classes.txt"))
    assert class_names(loaded) == class_names(stream) == NAMES
    assert [row["label"] for row in loaded["train"]] == [row["label"] for row in stream["train"]]
    assert [row["image"]["bytes"] for row in stream["train"]] == [numbered_image(number) for number in range(7)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("map.txt", "ant\nbee\ncat\n"),
        ("map.json", '["ant", "bee", "cat"]'),
        ("map.json", '{"bee": 1, "cat": 2, "ant": 0}'),
    ],
)
def test_a_class_map_names_the_classes(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_class_map(str(tmp_path / name)) == NAMES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("map.txt", "ant\nbee\nant", "names 'ant' 2 times"),
        ("map.txt", "", "must hold names of classes"),
        ("map.json", '{"ant": 1, "bee": 2}', r"must number its 2 classes 0\.\.1, each once"),
        ("map.json", "[1, 2]", "must hold names of classes"),
        ("map.json", "[", "cannot be read as text or JSON"),
        ("none.txt", None, "cannot be read as text or JSON"),
    ],
)
def test_a_class_map_that_names_no_classes_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"class_map '.*{name}' {message}"):
        read_class_map(str(tmp_path / name))


def test_labels_that_are_names_become_numbers_by_the_map_and_others_are_refused(tmp_path):
    folder = write_shards(tmp_path, [1])
    rows = [(numbered_image(number), name) for number, name in enumerate(("cat", "ant", "dog"))]
    write_tar(folder / "train-0000.tar", rows, label="cls.txt")
    write_tar(folder / "validation-0000.tar", rows, label="cls.txt")
    stream = iter(stream_image_data(str(folder), class_map=str(folder / "classes.txt"))["train"])
    assert [next(stream)["label"], next(stream)["label"]] == [2, 0]
    with pytest.raises(ValueError, match="dog"):
        next(stream)


def test_numbers_of_classes_without_names_ask_for_a_map(tmp_path):
    folder = write_shards(tmp_path, [4])
    with pytest.raises(ValueError, match="name them by class_map, or load the dataset without streaming"):
        stream_image_data(str(folder))
    write_parquet(tmp_path / "one.parquet", [(numbered_image(1), 7)])
    with pytest.raises(ValueError, match="Class label 7 greater than configured num_classes 3"):
        list(
            stream_image_data(
                str(tmp_path / "one.parquet"), eval_split="train", class_map=str(folder / "classes.txt")
            )["train"]
        )


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_are_streamed_by_their_hub_id(hub, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    folder = write_shards(tmp_path, [3, 4], kind)
    stated = {"train-0000.tar": 3, "train-0001.tar": 4, "validation-0000.tar": 3}
    files = {"all": {"filenames": list(stated), "shard_lengths": list(stated.values())}}
    (folder / "_info.json").write_text(json.dumps({"splits": files}))
    api = HfApi()
    api.create_repo("me/shards", repo_type="dataset")
    api.upload_folder(repo_id="me/shards", repo_type="dataset", folder_path=folder)
    split = stream_image_data("me/shards", class_map=str(folder / "classes.txt"))["train"]
    assert shard_lengths(split) == [3, 4]
    stream = ShardedStream(split, [3, 4], number, batch_size=4, seed=1, buffer_size=1)
    assert sorted(int(red) for batch in epoch_of(stream, 0) for red, *_ in batch) == list(range(7))
