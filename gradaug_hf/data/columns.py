"""Columns of a dataset: which hold the images and the labels, and one form for both."""

from collections.abc import Callable, Iterable

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

IMAGE_COLUMNS = ("image", "img", "pixel_values", "picture", "photo")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")


def _is_image(feature) -> bool:
    return isinstance(feature, Image)


def _is_encoded_image(feature) -> bool:
    return feature == Value("binary") or (isinstance(feature, dict) and "bytes" in feature)


def is_class_label(feature) -> bool:
    return isinstance(feature, ClassLabel)


def _is_int_or_string(feature) -> bool:
    return isinstance(feature, Value) and feature.dtype in {"int8", "int16", "int32", "int64", "uint8", "string"}


def find_columns(features: Features, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    images = _find_column(features, "image", image_column, IMAGE_COLUMNS, _is_image, _is_encoded_image)
    labels = _find_column(features, "label", label_column, LABEL_COLUMNS, is_class_label, _is_int_or_string)
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
    raise ValueError(f"the data set has {problem}; name one as {kind}_column. Columns found: {found}")


def standard_columns(splits: DatasetDict, image_column: str, label_column: str) -> DatasetDict:
    splits = splits.select_columns([image_column, label_column])
    splits = splits.rename_columns({image_column: "image", label_column: "label"})
    if not isinstance(splits["train"].features["label"], ClassLabel):
        splits = _with_class_labels(splits)
    splits = splits.cast_column("image", Image(decode=False))
    for name, split in splits.items():
        _check_labels(split)
        splits[name] = split.add_column("row", np.arange(len(split)))
    return splits


def _with_class_labels(splits: DatasetDict) -> DatasetDict:
    values = sorted(set().union(*(split.unique("label") for split in splits.values())) - {None})
    if not values:
        raise ValueError("the label column is empty")
    if isinstance(values[0], str):
        feature = ClassLabel(names=values)
        codes = {name: code for code, name in enumerate(values)}
    else:
        feature = ClassLabel(num_classes=max(values[-1], 0) + 1)
        codes = {value: value for value in values}
    return DatasetDict(
        {
            name: split.remove_columns("label").add_column(
                "label", [codes.get(value) for value in split["label"]], feature=feature
            )
            for name, split in splits.items()
        }
    )


def label_values(split: Dataset) -> np.ndarray:
    column = split.select_columns("label").with_format("arrow")[:]["label"]
    return column.fill_null(-1).to_numpy()


def _check_labels(split: Dataset) -> None:
    labels = label_values(split)
    classes = split.features["label"].num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        row = int(wrong[0])
        label = split.select_columns("label")[row]["label"]
        raise ValueError(f"row {row} of split {split.split}: label {label} is not in 0..{classes - 1}")
