"""Columns of a dataset: which hold the images and the labels, and one form for both."""

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

IMAGE_COLUMNS = ("image", "img", "pixel_values", "picture", "photo")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
BINARY = (pa.types.is_binary, pa.types.is_large_binary)


def _is_image(feature: object) -> bool:
    return isinstance(feature, Image)


def _is_encoded_image(feature: object) -> bool:
    return _has_type(feature, BINARY) or (isinstance(feature, dict) and "bytes" in feature)


def is_class_label(feature: object) -> bool:
    """Return whether a column holds numbers of classes that have names."""
    return isinstance(feature, ClassLabel)


def _is_class(feature: object) -> bool:
    return _has_type(feature, (*STRINGS, pa.types.is_integer, pa.types.is_boolean))


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
    if wanted is not None:
        if wanted in features and (certain(features[wanted]) or possible(features[wanted])):
            return wanted
        raise ValueError(f"{kind}_column={wanted!r} is not a column of {kind}s; columns found: {found}")
    for name in usual_names:
        if name in features and (certain(features[name]) or possible(features[name])):
            return name
    candidates = [name for name, feature in features.items() if certain(feature)]
    if len(candidates) == 1:
        return candidates[0]
    problem = f"several {kind} columns" if candidates else f"no {kind} column"
    raise ValueError(f"the dataset has {problem}; name one as {kind}_column. Columns found: {found}")


def standard_columns(splits: DatasetDict, image_column: str, label_column: str) -> DatasetDict:
    """Return splits with the columns `image` (encoded), `label` (a `ClassLabel`) and `row` (the position).

    Labels that are no `ClassLabel` become one: its classes are the distinct values of all splits, sorted, and their
    names are these values.

    Raises:
        ValueError: a label is missing or out of range, or there is one class alone.
    """
    splits = splits.select_columns([image_column, label_column])
    splits = splits.rename_columns({image_column: "image", label_column: "label"})
    for split in splits.values():
        _check_labels(split)
    if not is_class_label(splits["train"].features["label"]):
        splits = _with_class_labels(splits)
    names = splits["train"].features["label"].names
    if len(names) < 2:
        raise ValueError(
            f"the dataset has one class, {names[0]!r}, in column {label_column!r}; two or more are needed"
        )
    splits = splits.cast_column("image", Image(decode=False))
    return DatasetDict({name: split.add_column("row", np.arange(len(split))) for name, split in splits.items()})


def label_values(split: Dataset) -> np.ndarray:
    """Return the labels (N,) of a split with standard columns."""
    return _label_column(split).to_numpy()


def _label_column(split: Dataset) -> pa.ChunkedArray:
    return split.select_columns("label").with_format("arrow")[:]["label"]


def _check_labels(split: Dataset) -> None:
    """Raise a ValueError where a label is missing, or is the number of no class."""
    feature, column = split.features["label"], _label_column(split)
    wrong, accepted = pc.is_null(column), "a label in each row"
    if is_class_label(feature):
        accepted = f"0..{feature.num_classes - 1}"
        wrong = pc.or_(wrong, pc.or_(pc.less(column, 0), pc.greater_equal(column, feature.num_classes)))
    elif pa.types.is_integer(column.type):
        accepted = "0 or above"
        wrong = pc.or_(wrong, pc.less(column, 0))
    row = pc.index(pc.fill_null(wrong, True), True).as_py()
    if row >= 0:
        raise ValueError(f"row {row} of split {split.split} has label {column[row]}; expected {accepted}")


def _with_class_labels(splits: DatasetDict) -> DatasetDict:
    columns = {name: _plain(_label_column(split)) for name, split in splits.items()}
    values = pa.array(sorted(set().union(*(column.unique().to_pylist() for column in columns.values()))))
    feature = ClassLabel(names=[str(value) for value in values.to_pylist()])
    codes = {name: pc.index_in(column, values.cast(column.type)) for name, column in columns.items()}
    return DatasetDict(
        {
            name: split.remove_columns("label").add_column("label", codes[name].to_numpy(), feature=feature)
            for name, split in splits.items()
        }
    )


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return strings of any kind as plain ones, for which all of Arrow's functions are there."""
    return column.cast(pa.large_string()) if any(test(column.type) for test in STRINGS) else column
