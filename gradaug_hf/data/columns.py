"""Columns of a dataset: which hold the images and the labels, and one form for both.

A label is one class, or a list of the classes that an image has.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, LargeList, Sequence, Value
from torch import Tensor

IMAGE_COLUMNS = ("image", "img", "pixel_values", "picture", "photo")
# "cls" is what a class is called in a tar archive of webdataset.
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category", "cls", "cls.txt")
STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
# Kinds of list columns; the first is called List from datasets 4 on, and Sequence before.
LISTS = (type(Sequence(Value("int64"))), LargeList)
BINARY = (pa.types.is_binary, pa.types.is_large_binary)


def _is_image(feature: object) -> bool:
    return isinstance(feature, Image)


def _is_encoded_image(feature: object) -> bool:
    return _has_type(feature, BINARY) or (isinstance(feature, dict) and "bytes" in feature)


def is_multi_label(feature: object) -> bool:
    """Return whether a column holds lists."""
    return isinstance(feature, (*LISTS, list))


def classes_of(feature: object) -> Any:
    """Return the type of a single label of a column: its `ClassLabel` if `is_class_label` holds."""
    if isinstance(feature, list):
        return feature[0]
    return feature.feature if isinstance(feature, LISTS) else feature


def is_class_label(feature: object) -> bool:
    """Return whether a column holds numbers of classes that have names, or lists of them."""
    return isinstance(classes_of(feature), ClassLabel)


def multi_hot(labels: Iterable[Iterable[int]], num_classes: int) -> list[Tensor]:
    """Return for each image a float tensor (num_classes,), 1 for each class that it has.

    Examples:
        >>> multi_hot([[0, 2]], 3)
        [tensor([1., 0., 1.])]
    """
    return [torch.zeros(num_classes).index_fill(0, torch.tensor(classes, dtype=torch.long), 1) for classes in labels]


def _is_class(feature: object) -> bool:
    single = (*STRINGS, pa.types.is_integer)
    if is_multi_label(feature):
        return _has_type(classes_of(feature), single)
    return _has_type(feature, (*single, pa.types.is_boolean))


def _has_type(feature: object, tests: Iterable[Callable[[pa.DataType], bool]]) -> bool:
    return isinstance(feature, Value) and any(test(feature.pa_type) for test in tests)


def find_columns(features: Features, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """Return the names of the columns of images and labels: those that are named, else found by type and usual name.

    Raises:
        ValueError: a column is missing, of a wrong type, or one among several.
    """
    images = _find_column(features, "image", image_column, IMAGE_COLUMNS, _is_image, _is_encoded_image)
    labels = _find_column(features, "label", label_column, LABEL_COLUMNS, is_class_label, _is_class)
    return images, labels


def _find_column(
    features: Features,
    kind: str,
    wanted: str | None,
    usual_names: Iterable[str],
    certain: Callable[[object], bool],
    possible: Callable[[object], bool],
) -> str:
    found = ", ".join(f"{name} ({feature})" for name, feature in features.items())
    usable = {name for name, feature in features.items() if certain(feature) or possible(feature)}
    if wanted is not None:
        if wanted in usable:
            return wanted
        raise ValueError(f"{kind}_column={wanted!r} is not a column of {kind}s; columns found: {found}")
    for name in usual_names:
        if name in usable:
            return name
    candidates = [name for name, feature in features.items() if certain(feature)]
    if len(candidates) == 1:
        return candidates[0]
    problem = f"several {kind} columns" if candidates else f"no {kind} column"
    raise ValueError(f"the dataset has {problem}; name one as {kind}_column. Columns found: {found}")


def standard_columns(splits: DatasetDict, image_column: str, label_column: str) -> DatasetDict:
    """Return splits with the columns `image` (encoded), `label` (a `ClassLabel`) and `row` (the position).

    Labels that are no `ClassLabel` become one: its classes are the distinct values of all splits, sorted, and their
    names are these values. Lists of classes become lists of a `ClassLabel`.

    Raises:
        ValueError: a label is missing or out of range, is twice in a list, or there is one class alone.
    """
    splits = splits.select_columns([image_column, label_column])
    splits = splits.rename_columns({image_column: "image", label_column: "label"})
    for split in splits.values():
        _check_labels(split)
    if not is_class_label(splits["train"].features["label"]):
        splits = _with_class_labels(splits)
    names = classes_of(splits["train"].features["label"]).names
    if len(names) < 2:
        raise ValueError(
            f"the dataset has one class, {names[0]!r}, in column {label_column!r}; two or more are needed"
        )
    if splits["train"].features["image"] == Value("large_binary"):
        splits = splits.cast_column("image", Value("binary"))  # no images for datasets up to 4.5
    splits = splits.cast_column("image", Image(decode=False))
    return DatasetDict({name: split.add_column("row", np.arange(len(split))) for name, split in splits.items()})


def label_values(split: Dataset) -> np.ndarray:
    """Return the labels (N,) of a split with standard columns."""
    return _label_column(split).to_numpy()


def classes_found(split: Dataset) -> np.ndarray:
    """Return the sorted numbers of the classes that images of a split with standard columns have."""
    return np.unique(_classes_of_images(split)[1].to_numpy())


def _label_column(split: Dataset) -> pa.ChunkedArray:
    return split.select_columns("label").with_format("arrow")[:]["label"]


def _classes_of_images(split: Dataset) -> tuple[pa.Array, pa.Array]:
    """Return the rows and the classes of all labels; a row whose list is empty has none."""
    column = _label_column(split).combine_chunks()
    if not is_multi_label(split.features["label"]):
        return pa.array(np.arange(len(column))), column
    return pc.list_parent_indices(column), pc.list_flatten(column)


def _check_labels(split: Dataset) -> None:
    """Raise a ValueError where a label is missing, is the number of no class, or is twice in a list."""
    feature = split.features["label"]
    if is_multi_label(feature):
        _check_lists(split)
    rows, column = _classes_of_images(split)
    wrong, accepted = pc.is_null(column), "a label in each row"
    if is_class_label(feature):
        num_classes = classes_of(feature).num_classes
        accepted = f"0..{num_classes - 1}"
        wrong = pc.or_(wrong, pc.or_(pc.less(column, 0), pc.greater_equal(column, num_classes)))
    elif pa.types.is_integer(column.type):
        accepted = "0 or above"
        wrong = pc.or_(wrong, pc.less(column, 0))
    place = pc.index(pc.fill_null(wrong, True), True).as_py()
    if place >= 0:
        raise ValueError(f"row {rows[place]} of split {split.split} has label {column[place]}; expected {accepted}")


def _check_lists(split: Dataset) -> None:
    """Raise a ValueError where a list is missing, or names a class twice, as one of zeros and ones would."""
    missing = pc.index(pc.is_null(_label_column(split)), True).as_py()
    if missing >= 0:
        raise ValueError(f"row {missing} of split {split.split} has label None; expected a list, empty for no class")
    rows, column = _classes_of_images(split)
    pairs = pa.table({"row": rows, "label": _plain(column)}).group_by(["row", "label"], use_threads=False)
    counted = pairs.aggregate([([], "count_all")])
    twice = pc.index(pc.greater(counted["count_all"], 1), True).as_py()
    if twice >= 0:
        row, label = counted["row"][twice], counted["label"][twice]
        raise ValueError(
            f"row {row} of split {split.split} has label {label} twice; a list names each class that the image has "
            "once (not zeros and ones)"
        )


def _with_class_labels(splits: DatasetDict) -> DatasetDict:
    columns = {name: _plain(_classes_of_images(split)[1]) for name, split in splits.items()}
    values = pa.array(sorted(set().union(*(column.unique().to_pylist() for column in columns.values()))))
    feature = ClassLabel(names=[str(value) for value in values.to_pylist()])
    several = is_multi_label(splits["train"].features["label"])
    coded = {}
    for name, split in splits.items():
        codes = pc.index_in(columns[name], values.cast(columns[name].type)).to_numpy()
        labels = _as_lists(codes, _label_column(split)) if several else codes
        kind = Sequence(feature) if several else feature
        coded[name] = split.remove_columns("label").add_column("label", labels, feature=kind)
    return DatasetDict(coded)


def _as_lists(codes: np.ndarray, lists: pa.ChunkedArray) -> list[list[int]]:
    """Return codes as lists of the lengths of these."""
    ends = np.cumsum(pc.list_value_length(lists).to_numpy())
    return [part.tolist() for part in np.split(codes, ends[:-1])]


def _plain(column: pa.Array) -> pa.Array:
    """Return strings of any kind as plain ones, for which all of Arrow's functions are there."""
    return column.cast(pa.large_string()) if any(test(column.type) for test in STRINGS) else column
