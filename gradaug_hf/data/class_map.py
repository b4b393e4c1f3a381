"""Names of the classes from a file, for datasets that hold their numbers or their names alone."""

import json
from collections import Counter
from pathlib import Path

from datasets import ClassLabel, DatasetDict, IterableDatasetDict, Sequence

from gradaug_hf.data.columns import is_multi_label


def with_class_map(
    splits: DatasetDict | IterableDatasetDict, label_column: str, class_map: str | None
) -> DatasetDict | IterableDatasetDict:
    """Return splits whose labels, numbers or names of classes, are a `ClassLabel` with the names of a file, if any.

    A label that the file does not name is an error when its row is read.
    """
    if class_map is None:
        return splits
    label = ClassLabel(names=read_class_map(class_map))
    several = is_multi_label(splits["train"].features[label_column])
    return splits.cast_column(label_column, Sequence(label) if several else label)


def read_class_map(file: str) -> list[str]:
    """Return the names of the classes in the order of their numbers.

    Args:
        file: text with a name on each line, the first of class 0; or JSON, a list of names or an object that has the
            number of each name.

    Raises:
        ValueError: the file cannot be read, or names a class twice or numbers classes otherwise than from 0 on.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        names = json.loads(text) if file.endswith(".json") else [line.strip() for line in text.strip().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"class_map {file!r} cannot be read as text or JSON: {error}") from error
    if isinstance(names, dict):
        if sorted(names.values(), key=str) != sorted(range(len(names)), key=str):
            raise ValueError(f"class_map {file!r} must number its {len(names)} classes 0..{len(names) - 1}, each once")
        names = sorted(names, key=names.get)
    if not (isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)):
        raise ValueError(
            f"class_map {file!r} must hold names of classes: one on each line, or JSON, a list or an object"
        )
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"class_map {file!r} names {name!r} {times} times; each class needs a name of its own")
    return names
