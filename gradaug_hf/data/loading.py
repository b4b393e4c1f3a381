"""Image classification data: loading with `datasets`, columns and splits, decoding, and the paper's transforms."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
)
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import v2

from gradaug_hf.models.cifar import CIFAR_MEAN, CIFAR_STD

Transform = Callable[[PIL.Image.Image], Tensor]

IMAGE_COLUMNS = ("image", "img", "pixel_values", "picture", "photo")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
EVAL_SPLITS = ("validation", "test")
EVAL_SHARE = 0.2
ACCEPTED = "a Hub id, a parquet file, a folder of parquet files or a folder of images"
# Images that a stream holds in memory to shuffle them, still encoded; shards are shuffled as well.
SHUFFLE_BUFFER = 2000
# Images that a stream decodes at a time.
STREAM_BATCH = 16


class UnreadableImageError(ValueError):
    """An image cannot be decoded."""

    def __str__(self) -> str:
        # A worker process of a data loader raises it with its whole traceback as the message.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def load_image_data(
    name: str,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Load a data set of labelled images in one form, whatever its own columns and splits are called.

    Args:
        name: Hub id, parquet file, folder of parquet files, or folder of images sorted by class.
        config_name: Configuration of a Hub data set that has several.
        train_split: Split to train on.
        eval_split: Split to evaluate on; by default `validation`, else `test`. Where the training split is the only
            one, a fifth of each class is held out.
        image_column: Column of images; found by its type and name if not given.
        label_column: Column of classes; found by its type and name if not given.
        seed: Seed of the split, where one has to be made.

    Returns:
        Splits `train` and `eval` with the columns `image` (encoded), `label` (a `ClassLabel`) and `row` (the position
        in the split as it was stored).

    Raises:
        OSError: The data set cannot be found, reached or read.
        ValueError: A split or column is missing or ambiguous, or a label is missing or out of range.
    """
    chosen = _choose_splits(_load(name, config_name), train_split, eval_split)
    images, labels = _find_columns(chosen["train"].features, image_column, label_column)
    data = _standard_columns(chosen, images, labels)
    return data if "eval" in data else _hold_out(data["train"], seed)


def stream_image_data(
    name: str,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> IterableDatasetDict:
    """`load_image_data` without downloading or preparing anything first: images are read when they are needed.

    Args:
        name: as for `load_image_data`.
        config_name: as for `load_image_data`.
        train_split: as for `load_image_data`.
        eval_split: as for `load_image_data`, but nothing can be held out.
        image_column: as for `load_image_data`.
        label_column: as for `load_image_data`; its classes must have names.

    Returns:
        Splits `train` and `eval` with the columns `image` (encoded) and `label` (a `ClassLabel`), in the stored order.

    Raises:
        OSError: The data set cannot be found, reached or read.
        ValueError: A split or column is missing or ambiguous, or the labels have no names.
    """
    chosen = _choose_splits(_load(name, config_name, streaming=True), train_split, eval_split)
    if "eval" not in chosen:
        raise ValueError(
            f"split {train_split!r} is the only one, and nothing can be held out of a stream; name a split"
        )
    features = chosen["train"].features
    if features is None:
        raise ValueError(f"data set {name!r} does not say which columns it has; load it without streaming")
    images, labels = _find_columns(features, image_column, label_column)
    if not _is_class_label(features[labels]):
        raise ValueError(
            f"label_column {labels!r} is a {features[labels]}, whose classes are known only once all of it was read; "
            "load the data set without streaming"
        )
    names = {old: new for old, new in ((images, "image"), (labels, "label")) if old != new}
    return IterableDatasetDict(
        {
            key: split.select_columns([images, labels]).cast_column(images, Image(decode=False)).rename_columns(names)
            for key, split in chosen.items()
        }
    )


def load_digits_data(size: int = 32) -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits, in the form of `load_image_data`.

    The first half is for training and the second for evaluation, as in scikit-learn's own example.

    Args:
        size: Side in pixels to which the 8x8 images are enlarged.

    Returns:
        Splits `train` and `eval` with the columns `image`, `label` and `row`.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = [PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BICUBIC) for image in pixels]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    half = len(images) // 2
    splits = {"train": slice(None, half), "eval": slice(half, None)}
    chosen = {
        split: Dataset.from_dict(
            {"image": [image.convert("RGB") for image in images[rows]], "label": digits.target[rows]},
            features=features,
            split=split,
        )
        for split, rows in splits.items()
    }
    return _standard_columns(DatasetDict(chosen), "image", "label")


def class_names(data: DatasetDict | IterableDatasetDict) -> list[str]:
    """Names of the classes, in the order of the labels."""
    return data["train"].features["label"].names


def number_of_images(split: Dataset | IterableDataset) -> int | None:
    """Number of images of a split; None where a stream does not say."""
    if isinstance(split, Dataset):
        return len(split)
    known = (split.info.splits or {}).get(str(split.split))
    return known.num_examples if known is not None and known.num_examples else None


def take_images(split: Dataset | IterableDataset, number: int, seed: int) -> Dataset | IterableDataset:
    """At most `number` images, drawn from the seed; of a stream the first ones."""
    if isinstance(split, IterableDataset):
        return split.take(number)
    return split.shuffle(seed=seed).take(min(number, len(split)))


def balanced_subset(split: Dataset, labels_per_class: int, seed: int = 0) -> Dataset:
    """Draw the same number of images of each class.

    Args:
        split: Data with a column `label`.
        labels_per_class: Number of images of each class.
        seed: Seed of the draw; the same seed draws the same images.

    Raises:
        ValueError: `labels_per_class` is not positive, or larger than the number of images of a class.
    """
    if labels_per_class < 1:
        raise ValueError(f"labels_per_class={labels_per_class}: at least 1 is needed")
    labels = _labels(split)
    generator = np.random.default_rng(seed)
    rows = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < labels_per_class:
            name = split.features["label"].int2str(int(label))
            raise ValueError(f"labels_per_class={labels_per_class}: class {name!r} has only {len(members)} images")
        rows.append(generator.choice(members, labels_per_class, replace=False))
    return split.select(np.sort(np.concatenate(rows)))


def with_pixels(split: Dataset | IterableDataset, transform: Transform) -> Dataset | IterableDataset:
    """Decode and transform the images when they are read, so in the workers of a data loader.

    Args:
        split: Data with the columns `image`, `label` and, unless it is a stream, `row`.
        transform: Function of an RGB image that returns a tensor (3, H, W).

    Returns:
        Data whose examples are `pixel_values`, a tensor (3, H, W), and `labels`, an int. Reading an example raises
        `UnreadableImageError` with its row where the image cannot be decoded.
    """
    if isinstance(split, IterableDataset):
        read = partial(_read_batch, transform=transform, split=str(split.split))
        return split.map(read, batched=True, batch_size=STREAM_BATCH, remove_columns=["image", "label"])
    return split.with_transform(partial(_read_batch, transform=transform, split=str(split.split)))


def cifar_transform(
    train: bool,
    *,
    size: int = 32,
    flip: bool = True,
    mean: tuple[float, ...] = CIFAR_MEAN,
    std: tuple[float, ...] = CIFAR_STD,
) -> Transform:
    """The paper's CIFAR transform: for training a reflected border of an eighth, a random crop and a flip.

    Images of another size are first resized and cropped to a square.

    Args:
        train: Whether to augment.
        size: Side of the square in pixels.
        flip: Whether to flip half of the training images; wrong where left and right matter, as for digits.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, in 0..1.
    """
    steps = [v2.Resize(size), v2.CenterCrop(size)]
    if train:
        steps.append(v2.RandomCrop(size, padding=size // 8, padding_mode="reflect"))
        if flip:
            steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, *_to_tensor(mean, std)])


def imagenet_transform(
    train: bool,
    *,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
) -> Transform:
    """The paper's ImageNet transform to 224x224 pixels.

    For training a random resized crop, a flip and colour jitter of 0.4 in brightness, contrast and saturation; for
    evaluation the centre of the image with a short side of 256.

    Args:
        train: Whether to augment.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, in 0..1.
    """
    if train:
        steps = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4)]
    else:
        steps = [v2.Resize(256), v2.CenterCrop(224)]
    return v2.Compose([*steps, *_to_tensor(mean, std)])


def _to_tensor(mean: tuple[float, ...], std: tuple[float, ...]) -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]


def _load(name: str, config_name: str | None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    try:
        if Path(name).is_file():
            return load_dataset("parquet", data_files=str(name), streaming=streaming)
        return load_dataset(str(name), config_name, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise OSError(f"data set {name!r} {_what_to_do(error, name)}") from error


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
            raise ValueError(f"the data set has no split {split!r}; splits found: {found}")
    if len(loaded) == 1 and eval_split is None:
        return kind(train=loaded[train_split])
    if eval_split is None:
        eval_split = next((split for split in EVAL_SPLITS if split in loaded and split != train_split), None)
    if eval_split is None:
        raise ValueError(f"no split to evaluate on; name one as eval_split. Splits found: {found}")
    return kind(train=loaded[train_split], eval=loaded[eval_split])


def _is_image(feature) -> bool:
    return isinstance(feature, Image)


def _is_encoded_image(feature) -> bool:
    return feature == Value("binary") or (isinstance(feature, dict) and "bytes" in feature)


def _is_class_label(feature) -> bool:
    return isinstance(feature, ClassLabel)


def _is_int_or_string(feature) -> bool:
    return isinstance(feature, Value) and feature.dtype in {"int8", "int16", "int32", "int64", "uint8", "string"}


def _find_columns(features: Features, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    images = _find_column(features, "image", image_column, IMAGE_COLUMNS, _is_image, _is_encoded_image)
    labels = _find_column(features, "label", label_column, LABEL_COLUMNS, _is_class_label, _is_int_or_string)
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


def _standard_columns(splits: DatasetDict, image_column: str, label_column: str) -> DatasetDict:
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


def _labels(split: Dataset) -> np.ndarray:
    column = split.select_columns("label").with_format("arrow")[:]["label"]
    return column.fill_null(-1).to_numpy()


def _check_labels(split: Dataset) -> None:
    labels = _labels(split)
    classes = split.features["label"].num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        row = int(wrong[0])
        label = split.select_columns("label")[row]["label"]
        raise ValueError(f"row {row} of split {split.split}: label {label} is not in 0..{classes - 1}")


def _hold_out(split: Dataset, seed: int) -> DatasetDict:
    labels, counts = np.unique(_labels(split), return_counts=True)
    if counts.min() < 2:
        name = split.features["label"].int2str(int(labels[counts.argmin()]))
        raise ValueError(
            f"split {split.split} is the only one, and class {name!r} has a single image: none can be held out "
            "for evaluation. Name a split as eval_split"
        )
    parts = split.train_test_split(EVAL_SHARE, stratify_by_column="label", seed=seed)
    return DatasetDict(train=parts["train"], eval=parts["test"])


def _read_batch(batch: dict[str, list], transform: Transform, split: str) -> dict[str, list]:
    rows = batch.get("row", [None] * len(batch["image"]))
    images = (decode(image, row, split) for image, row in zip(batch["image"], rows, strict=True))
    return {"pixel_values": [transform(image) for image in images], "labels": batch["label"]}


def decode(encoded: dict | None, row: int | None, split: str) -> PIL.Image.Image:
    """An image in RGB.

    Args:
        encoded: its `bytes` and `path`, of which one may be None.
        row: its position in the split, for the error; None if it is not known.
        split: name of the split.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    place = f"split {split}" if row is None else f"row {row} of split {split}"
    if encoded is None:
        raise UnreadableImageError(f"there is no image in {place}")
    try:
        return _to_rgb(Image().decode_example(encoded))
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        file = f" ({encoded['path']})" if encoded["path"] else ""
        raise UnreadableImageError(f"the image in {place}{file} cannot be decoded: {error}") from error


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I;16"):  # Pillow clips 16 bits at 255 instead of scaling them
        image = PIL.Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode == "P":  # Pillow warns when it drops the transparency of a palette in one go
        image = image.convert("RGBA")
    return image.convert("RGB")
