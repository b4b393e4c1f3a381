"""Folders of images: the splits, classes and images in them, by one rule."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Image, NamedSplit
from transformers.utils import logging

from gradaug_hf.data.columns import LABEL_COLUMNS

logger = logging.get_logger(__name__)

# Name of a folder at the first level, in small letters -> its split.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "dev"), "validation"),
    "test": "test",
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
LAYOUT = f"CLASS/IMAGE, or SPLIT/CLASS/IMAGE with SPLIT one of {', '.join(SPLIT_FOLDERS)}"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file below a folder.

    Args:
        parts: names of its folders and its own, below that folder.
        file: its path.
        target: where it lies once links are followed.
    """

    parts: tuple[str, ...]
    file: str
    target: str

    @property
    def split(self) -> str | None:
        """Return the split that the folder of the first level is named like, or None."""
        return SPLIT_FOLDERS.get(self.parts[0].lower()) if len(self.parts) > 1 else None


# The images of each split, with their labels.
Rows = dict[str, list[tuple[ImageFile, Any]]]


@dataclass
class FolderContent:
    """Files below a folder, by what they are to a dataset of images.

    Args:
        folder: the folder.
        images: files that Pillow reads, by their names.
        metadata: files that may say the label of each image.
        tables: other parquet files.
        left_out: number of files and folders that are neither, by the reason.
    """

    folder: Path
    images: list[ImageFile] = field(default_factory=list)
    metadata: list[ImageFile] = field(default_factory=list)
    tables: list[ImageFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def is_image_folder(self) -> bool:
        """Return whether this is a folder of images rather than one of parquet files."""
        return bool(self.images) and not self.tables


def read_folder(folder: Path) -> FolderContent:
    """Find the files below a folder, hidden ones left out and links followed; no file is opened.

    Raises:
        OSError: a folder cannot be read.
        ValueError: a link leads back to a folder that it lies in.
    """
    content = FolderContent(folder)
    suffixes = {suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
    for found in _files_below(os.path.abspath(folder), content.left_out):
        name = found.parts[-1]
        suffix = os.path.splitext(name)[1].lower()
        if name in METADATA:
            content.metadata.append(found)
        elif suffix == ".parquet":
            content.tables.append(found)
        elif suffix in suffixes:
            content.images.append(found)
        else:
            content.left_out["not an image"] += 1
    return content


def load_image_folder(content: FolderContent, label_column: str | None = None) -> DatasetDict:
    """Load a folder of images whose labels are folders, or a column of a `metadata.csv`, `.jsonl` or `.parquet`.

    Where the first level has a folder named like a split, with folders in it, its folders are the splits `train`,
    `validation` and `test`, and those below them the classes. Else the folders of the first level are the classes.
    Images in deeper folders belong to the class above them. One line of the log counts what was loaded and left out.

    Args:
        content: of a folder, as `read_folder` returns it.
        label_column: column of the metadata; by default one of the usual names.

    Returns:
        Splits with the columns `image`, paths that are not read yet, and `label` or what the column is called.

    Raises:
        ValueError: the folders fit neither rule or both, an image is in two splits or classes, or the metadata cannot
            be read or divided among the splits.
    """
    tables = [(file, _read_table(file.file)) for file in content.metadata]
    columns = {name for _, table in tables if "file_name" in table.column_names for name in table.column_names}
    column = next((name for name in ([label_column] if label_column else LABEL_COLUMNS) if name in columns), None)
    if column is None:
        column, rows = "label", _labels_of_folders(content)
    else:
        rows = _labels_of_metadata(content, tables, column)
    _refuse_shared_images(rows)
    _log(content, rows)
    order = [split for split in dict.fromkeys(SPLIT_FOLDERS.values()) if split in rows]
    return DatasetDict({split: _dataset(rows[split], column, split) for split in order})


def _files_below(
    folder: str, left_out: Counter[str], parts: tuple[str, ...] = (), above: tuple[str, ...] = ()
) -> Iterator[ImageFile]:
    """Yield the files below a folder, which lies at `parts` below the first one and, links followed, in `above`."""
    target = os.path.realpath(folder)
    if target in above:
        raise ValueError(f"{folder} is a link to {target}, a folder that it lies in; remove the link")
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        below = (*parts, entry.name)
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif entry.is_dir():
            yield from _files_below(entry.path, left_out, below, (*above, target))
        elif entry.is_file():
            file = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(target, entry.name)
            yield ImageFile(below, entry.path, entry.path if file == entry.path else file)  # one text, not two
        else:
            left_out["a link to nothing"] += 1


# ---- labels ----


def _labels_of_folders(content: FolderContent) -> Rows:
    level = _level_of_classes(content)
    rows: Rows = {}
    outside = []
    for image in content.images:
        if len(image.parts) < level + 2:
            outside.append(image)
        else:
            rows.setdefault(image.split if level else "train", []).append((image, image.parts[level]))
    if outside:
        _leave_out(content, outside, "not in the folder of a class")
    content.left_out["metadata without labels"] += len(content.metadata)
    names = {label for images in rows.values() for _, label in images}
    if len(names) == 1:
        raise ValueError(f"{content.folder} has one class, {names.pop()!r}; two or more are needed. Expected {LAYOUT}")
    return rows


def _level_of_classes(content: FolderContent) -> int:
    """Return the level of the folders of classes: 0 without folders of splits, 1 below them."""
    folder, depths = content.folder, {}
    for image in content.images:
        name = image.parts[0]
        depths[name] = max(depths.get(name, 0), len(image.parts))
    depths = {name: depth for name, depth in depths.items() if depth > 1}
    like_splits = {name for name in depths if name.lower() in SPLIT_FOLDERS}
    others = _listed(set(depths) - like_splits)
    if not depths:
        raise ValueError(f"{folder} holds {len(content.images)} images but no folders of classes; expected {LAYOUT}")
    if all(depths[name] == 2 for name in like_splits):  # there are no folders in them
        if not others:
            raise ValueError(
                f"the folders {_listed(like_splits)} of {folder} hold images but no folders of classes; expected "
                f"{LAYOUT}"
            )
        if like_splits:
            warnings.warn(
                f"the folders {_listed(like_splits)} of {folder} are read as classes, as {others} are: they hold "
                "images, and no folders of classes",
                stacklevel=6,
            )
        return 0
    if others:
        raise ValueError(
            f"{folder} holds the folders {_listed(like_splits)}, named like splits with classes in them, beside "
            f"{others}, which are no splits; move either away, so that all are {LAYOUT}"
        )
    twice = Counter(SPLIT_FOLDERS[name.lower()] for name in like_splits)
    if max(twice.values()) > 1:
        raise ValueError(f"the folders {_listed(like_splits)} of {folder} hold one split twice; merge or rename them")
    return 1


def _read_table(file: str) -> pa.Table:
    try:
        if file.endswith(".parquet"):
            return pq.read_table(file)
        if file.endswith(".jsonl"):
            return pa_json.read_json(file)
        return pa_csv.read_csv(file, parse_options=pa_csv.ParseOptions(newlines_in_values=True))
    except pa.ArrowException as error:
        raise ValueError(f"{file} cannot be read as metadata of images: {error}") from error


def _labels_of_metadata(content: FolderContent, tables: Sequence[tuple[ImageFile, pa.Table]], column: str) -> Rows:
    images = {image.file: image for image in content.images}
    has_splits = any(image.split for image in content.images)
    tables = [(file, table) for file, table in tables if {"file_name", column} <= set(table.column_names)]
    kinds = {str(table[column].type) for _, table in tables}
    if len(kinds) > 1:
        raise ValueError(f"column {column!r} of the metadata in {content.folder} is {_listed(kinds)}; use one type")
    rows: Rows = {}
    for file, table in tables:
        if has_splits and file.split is None:
            raise ValueError(f"{file.file} lies beside folders of splits; write one into the folder of each split")
        for name, label in zip(table["file_name"].to_pylist(), table[column].to_pylist(), strict=True):
            path = os.path.normpath(os.path.join(os.path.dirname(file.file), str(name)))
            if path not in images:
                raise ValueError(f"{file.file} names {name!r}, which is no image in {content.folder}")
            rows.setdefault(file.split or "train", []).append((images[path], label))
    if not rows:
        raise ValueError(f"{tables[0][0].file} has no rows; each image needs one")
    named = {image.file for labelled in rows.values() for image, _ in labelled}
    if unnamed := [image for image in content.images if image.file not in named]:
        _leave_out(content, unnamed, "not in the metadata")
    return rows


def _refuse_shared_images(rows: Rows) -> None:
    places: dict[str, tuple[str, Any, str]] = {}
    for split, images in rows.items():
        for image, label in images:
            first = places.setdefault(image.target, (split, label, image.file))
            if first[:2] != (split, label):
                raise ValueError(
                    f"{first[2]} and {image.file} are one image, in class {first[1]!r} of {first[0]} and in class "
                    f"{label!r} of {split}; an image must be in one split and one class"
                )


def _dataset(rows: Sequence[tuple[ImageFile, Any]], column: str, split: str) -> Dataset:
    columns = {column: [label for _, label in rows], "image": [image.file for image, _ in rows]}
    return Dataset.from_dict(columns, split=NamedSplit(split)).cast_column("image", Image(decode=False))


# ---- messages ----


def _leave_out(content: FolderContent, images: Sequence[ImageFile], reason: str) -> None:
    content.left_out[reason] += len(images)
    warnings.warn(
        f"{len(images)} images in {content.folder} are left out, {images[0].file} first, since they are {reason}; "
        f"expected {LAYOUT}, or a metadata file that names them",
        stacklevel=6,
    )


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _log(content: FolderContent, rows: Rows) -> None:
    counts = ", ".join(f"{len(images)} for {split}" for split, images in rows.items())
    classes = len({label for images in rows.values() for _, label in images})
    reasons = ", ".join(f"{count} ({reason})" for reason, count in content.left_out.items() if count)
    logger.info(f"images in {content.folder}: {counts}, in {classes} classes; left out: {reasons or 'none'}")
