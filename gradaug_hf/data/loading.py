"""Datasets of labelled images from the Hub, a file or a folder, with one split to train and one to evaluate on."""

import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from gradaug_hf.data.class_map import with_class_map
from gradaug_hf.data.columns import (
    classes_found,
    classes_of,
    find_columns,
    is_class_label,
    is_multi_label,
    label_values,
    standard_columns,
)
from gradaug_hf.data.folders import FolderContent, load_image_folder, read_folder
from gradaug_hf.data.shards import count_images, know_lengths

EVAL_SPLITS = ("validation", "test")
EVAL_SHARE = 0.2
ACCEPTED = "a Hub id, a parquet file, a folder of parquet files, of tar archives or of images"
# Images that a stream holds in memory to shuffle them, still encoded; shards are shuffled as well.
SHUFFLE_BUFFER = 2000
# Parts of a folder of images that is streamed, among which the workers of a data loader divide it.
STREAM_SHARDS = 64


def load_image_data(
    name: str,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_map: str | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Load a dataset of labelled images in one form, whatever its own columns and splits are called.

    Lists of classes (multi-label) stay lists, of which `with_pixels` makes multi-hot labels.

    Args:
        name: Hub id, parquet file, folder of parquet files or of tar archives in the form of webdataset, or folder of
            images sorted by class (`load_image_folder`).
        config_name: Configuration of a Hub dataset that has several.
        train_split: Split to train on.
        eval_split: Split to evaluate on; by default `validation`, else `test`. Where the training split is the only
            one, a fifth of each class is held out; a fifth of the images where these have several classes.
        image_column: Column of images; found by its type and name if not given.
        label_column: Column of classes; found by its type and name if not given.
        class_map: File with the names of the classes (`read_class_map`); by default the dataset's own.
        seed: Seed of the split, where one has to be made.

    Returns:
        Splits `train` and `eval` with the columns `image` (encoded), `label` (a `ClassLabel`, or lists of one) and
        `row` (the position in the split as it was stored).

    Raises:
        OSError: The dataset cannot be found, reached or read.
        ValueError: A split or column is missing or ambiguous, a split is empty, a label is missing or out of range,
            there is one class alone, or folders of images do not say what are splits and what classes.

    Examples:
        >>> data = load_image_data("photos")  # photos/train/cat/1.png, photos/test/dog/2.png and so on
        >>> len(data["train"]), class_names(data)
        (4, ['cat', 'dog'])
    """
    chosen = _choose_splits(_load(name, config_name, label_column), train_split, eval_split)
    images, labels = find_columns(chosen["train"].features, image_column, label_column)
    data = standard_columns(with_class_map(chosen, labels, class_map), images, labels)
    if "eval" not in data:
        data = _hold_out(data["train"], seed)
    _warn_of_unseen_classes(data)
    return data


def load_two_folders(train_dir: str, validation_dir: str, *, label_column: str | None = None) -> DatasetDict:
    """Load a folder of images to train on and another to evaluate on, in the form of `load_image_data`.

    Both are sorted by class, or have metadata with the column of labels.

    Raises:
        OSError: A folder cannot be read.
        ValueError: As `load_image_data`; or a folder holds no images, or folders of splits.
    """
    loaded = {}
    for split, folder in (("train", train_dir), ("eval", validation_dir)):
        content = read_folder(Path(folder))
        if not content.is_image_folder:
            raise ValueError(f"{folder} holds {'parquet files' if content.tables else 'no images'}; expected images")
        found = load_image_folder(content, label_column)
        if list(found) != ["train"]:
            raise ValueError(f"{folder} holds folders of splits, {', '.join(found)}; name one of them, or it alone")
        loaded[split] = found["train"]
    data = standard_columns(DatasetDict(loaded), *find_columns(loaded["train"].features, None, label_column))
    _warn_of_unseen_classes(data)
    return data


def stream_image_data(
    name: str,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_map: str | None = None,
) -> IterableDatasetDict:
    """Load a dataset as `load_image_data` does, but read its images only when they are needed.

    Nothing can be held out of a stream, and its classes must have names, those of a `class_map` for example.

    Returns:
        Splits `train` and `eval` with the columns `image` (encoded) and `label` (a `ClassLabel`), in the stored order.
        `shard_lengths` says how many images each of their shards holds, where that is known.

    Raises:
        OSError: The dataset cannot be found, reached or read.
        ValueError: A split or column is missing or ambiguous, the labels have no names, or folders of images do not
            say what are splits and what classes.

    Examples:
        >>> data = stream_image_data("photos")
        >>> next(iter(data["train"]))["label"]
        0
    """
    loaded = _load(name, config_name, label_column, streaming=True)
    chosen = _choose_splits(loaded, train_split, eval_split)
    if "eval" not in chosen:
        raise ValueError(
            f"split {train_split!r} is the only one, and nothing can be held out of a stream; name a split"
        )
    if isinstance(chosen, DatasetDict):  # a folder of images, whose labels are known
        images, labels = find_columns(chosen["train"].features, image_column, label_column)
        data = standard_columns(with_class_map(chosen, labels, class_map), images, labels)
        return IterableDatasetDict({key: _stream(split.remove_columns("row")) for key, split in data.items()})
    features = chosen["train"].features
    if features is None:
        raise ValueError(f"dataset {name!r} does not say which columns it has; load it without streaming")
    images, labels = find_columns(features, image_column, label_column)
    chosen = with_class_map(chosen, labels, class_map)
    if not is_class_label(chosen["train"].features[labels]):
        raise ValueError(
            f"label_column {labels!r} is a {features[labels]}, whose classes are known only once all of it was read; "
            "name them by class_map, or load the dataset without streaming"
        )
    names = {old: new for old, new in ((images, "image"), (labels, "label")) if old != new}
    streams = IterableDatasetDict(
        {
            key: split.select_columns([images, labels]).cast_column(images, Image(decode=False)).rename_columns(names)
            for key, split in chosen.items()
        }
    )
    files = str(Path(name).absolute()) if Path(name).is_file() else None
    builder = load_dataset_builder("parquet" if files else str(name), config_name, data_files=files)
    know_lengths(streams, count_images(builder, [str(split.split) for split in chosen.values()]))
    return streams


def class_names(data: DatasetDict | IterableDatasetDict) -> list[str]:
    """Return the names of the classes, in the order of the labels.

    Examples:
        >>> class_names(load_image_data("photos"))
        ['cat', 'dog']
    """
    return classes_of(data["train"].features["label"]).names


def check_one_class(data: DatasetDict | IterableDatasetDict) -> None:
    """Raise a ValueError where images have lists of classes, which the recipes do not train and evaluate."""
    if is_multi_label(data["train"].features["label"]):
        raise ValueError(
            "images have lists of classes, and this command needs one class for each image; give the dataset to "
            'GradAugTrainer with problem_type="multi_label_classification"'
        )


def number_of_images(split: Dataset | IterableDataset) -> int | None:
    """Return the number of images of a split; None where a stream does not say."""
    if isinstance(split, Dataset):
        return len(split)
    known = (split.info.splits or {}).get(str(split.split))
    return known.num_examples if known is not None and known.num_examples else None


def take_images(split: Dataset | IterableDataset, number: int | None, seed: int) -> Dataset | IterableDataset:
    """Return at most `number` images of a split, sampled by the seed, of a stream the first ones; None takes all."""
    if number is None:
        return split
    if isinstance(split, IterableDataset):
        return split.take(number)
    return split.shuffle(seed=seed).take(min(number, len(split)))


def balanced_subset(split: Dataset, labels_per_class: int, seed: int = 0) -> Dataset:
    """Sample the same number of images of each class.

    Args:
        split: Data with a column `label`.
        labels_per_class: Number of images of each class.
        seed: Seed of the sample; the same seed gives the same images.

    Raises:
        ValueError: `labels_per_class` is not positive, or larger than the number of images of a class, or images have
            several classes.

    Examples:
        >>> data = load_image_data("photos")
        >>> len(balanced_subset(data["train"], labels_per_class=1))
        2
    """
    if labels_per_class < 1:
        raise ValueError(f"labels_per_class={labels_per_class}: at least 1 is needed")
    if is_multi_label(split.features["label"]):
        raise ValueError("images have lists of classes; a balanced subset needs one class for each image")
    labels = label_values(split)
    generator = np.random.default_rng(seed)
    rows = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < labels_per_class:
            name = split.features["label"].int2str(int(label))
            raise ValueError(f"labels_per_class={labels_per_class}: class {name!r} has only {len(members)} images")
        rows.append(generator.choice(members, labels_per_class, replace=False))
    return split.select(np.sort(np.concatenate(rows)))


def _load(
    name: str, config_name: str | None, label_column: str | None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    content = read_folder(Path(name)) if Path(name).is_dir() else None
    if content is not None and content.is_image_folder:
        if config_name is not None:
            raise ValueError(f"config_name is {config_name!r}, but {name} is a folder of images, which has none")
        return load_image_folder(content, label_column)
    try:
        if Path(name).is_file():
            return load_dataset("parquet", data_files=str(name), streaming=streaming)
        if content is not None:
            _warn_of_unread_files(content, load_dataset_builder(str(name), config_name))
        return load_dataset(str(name), config_name, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise OSError(f"dataset {name!r} {_what_to_do(error, name)}") from error


def _warn_of_unread_files(content: FolderContent, builder: DatasetBuilder) -> None:
    """Warn of parquet files whose names say no split, which `datasets` passes over where those of others do."""
    read = {os.path.realpath(file) for files in (builder.config.data_files or {}).values() for file in files}
    if unread := [table.file for table in content.tables if table.target not in read]:
        warnings.warn(
            f"{len(unread)} parquet files in {content.folder} are not read, {unread[0]} first, since the names of "
            "others say a split, such as train or test; name all of them by their split, or give one file",
            stacklevel=4,
        )


def _stream(split: Dataset) -> IterableDataset:
    number = min(STREAM_SHARDS, len(split))
    parts = [split.shard(number, part) for part in range(number)]
    stream = IterableDataset.from_generator(
        _rows, features=split.features, gen_kwargs={"parts": parts}, split=split.split
    )
    name = str(split.split)
    know_lengths(IterableDatasetDict({name: stream}), {name: [len(part) for part in parts]})
    return stream


def _rows(parts: list[Dataset]) -> Iterator[dict]:
    for part in parts:
        yield from part


def _what_to_do(error: BaseException, name: str) -> str:
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) or "gated dataset" in str(cause) for cause in causes):
        page = f"https://huggingface.co/datasets/{name}"
        return f"is gated: accept its terms at {page}, then sign in with `hf auth login`"
    if any(isinstance(cause, (ConnectionError, LocalEntryNotFoundError)) for cause in causes):
        return (
            "is neither a file nor a folder here, and the Hub cannot be reached to look for it: connect to the "
            f"network, or unset HF_HUB_OFFLINE; {ACCEPTED} is accepted. {error}"
        )
    if any("corresponds to no data" in str(cause) for cause in causes):
        return f"has a split without images. {error}"
    if isinstance(error, DatasetNotFoundError):
        return f"is not on the Hub, or it is private: check its name, or sign in with `hf auth login`. {error}"
    return f"cannot be loaded; {ACCEPTED} is accepted. {error}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _choose_splits(
    loaded: DatasetDict | IterableDatasetDict, train_split: str, eval_split: str | None
) -> DatasetDict | IterableDatasetDict:
    kind = type(loaded)
    found = ", ".join(loaded)
    for split in filter(None, (train_split, eval_split)):
        if split not in loaded:
            raise ValueError(f"the dataset has no split {split!r}; splits found: {found}")
    if len(loaded) == 1 and eval_split is None:
        return kind(train=loaded[train_split])
    if eval_split is None:
        eval_split = next((split for split in EVAL_SPLITS if split in loaded and split != train_split), None)
    if eval_split is None:
        raise ValueError(f"no split to evaluate on; name one as eval_split. Splits found: {found}")
    return kind(train=loaded[train_split], eval=loaded[eval_split])


def _warn_of_unseen_classes(data: DatasetDict) -> None:
    unseen = np.setdiff1d(classes_found(data["eval"]), classes_found(data["train"]))
    if len(unseen):
        classes = classes_of(data["eval"].features["label"])
        names = ", ".join(classes.int2str([int(label) for label in unseen[:5]]))
        warnings.warn(
            f"{len(unseen)} classes of split {data['eval'].split} have no image in split {data['train'].split}, so "
            f"that no model can learn them: {names}{', ...' if len(unseen) > 5 else ''}",
            stacklevel=3,
        )


def _hold_out(split: Dataset, seed: int) -> DatasetDict:
    if is_multi_label(split.features["label"]):
        if len(split) < 2:
            raise ValueError(f"split {split.split} is the only one and has a single image: none can be held out")
        parts = split.train_test_split(math.ceil(EVAL_SHARE * len(split)), seed=seed)
        return DatasetDict(train=parts["train"], eval=parts["test"])
    labels, counts = np.unique(label_values(split), return_counts=True)
    if counts.min() < 2:
        name = split.features["label"].int2str(int(labels[counts.argmin()]))
        raise ValueError(
            f"split {split.split} is the only one, and class {name!r} has a single image: none can be held out "
            "for evaluation. Name a split as eval_split"
        )
    held_out = max(math.ceil(EVAL_SHARE * len(split)), len(labels))
    parts = split.train_test_split(held_out, stratify_by_column="label", seed=seed)
    return DatasetDict(train=parts["train"], eval=parts["test"])
