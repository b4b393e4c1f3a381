"""Predictions of a model on a folder of photos, as a CSV file."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, PreTrainedModel

from gradaug_hf.data.backbone_transforms import ProcessorTransform
from gradaug_hf.data.decoding import UnreadableImageError, decode
from gradaug_hf.data.folders import read_folder
from gradaug_hf.hub.networks import checkpoint_folder, image_processor, load_checkpoint, pretrained_source
from gradaug_hf.hub.preprocessing import image_processor_doing, input_config
from gradaug_hf.objective.logits import logits_of
from gradaug_hf.slimming import at_width, make_slimmable, recalibrate_batchnorm
from gradaug_hf.slimming.widths import check_width

TOP = 3
# Photos, at most, of which batch norm is recalibrated.
CALIBRATION_PHOTOS = 1024


def predict(
    model: str,
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    batch_size: int = 32,
    width: float | None = None,
    calibration_images: str | Path | None = None,
) -> tuple[int, dict[str, str]]:
    """Write the most probable classes of photos to a CSV file: file, label, probability, and those of the next two.

    They are those of the pipeline `image-classification` of transformers. Photos that cannot be read are left out.

        predict("outputs/ants", ["holiday"], "predictions.csv")

    Args:
        model: folder or Hub id of a model of timm or transformers, or the name of a pretrained one of timm.
        paths: photos, and folders with photos in them or their folders.
        output: CSV file; written whole or not at all.
        batch_size: photos at a time, at least 1.
        width: width multiplier in (0, 1] of the sub-network that predicts; None: the full network does.
        calibration_images: folder of training photos, of which the batch norm of a sub-network takes its statistics.

    Returns:
        The number of photos that were predicted, and the files that were left out, each with the reason.

    Raises:
        ValueError: an argument is out of its range or contradicts another, or the model or no photo can be read.
    """
    output = Path(output)
    _check(batch_size, width, calibration_images, output)
    files = find_photos(paths)
    source = pretrained_source(model)
    classifier = load_checkpoint(source).to(_device()).eval()
    labels = class_labels(source, classifier)
    processor = image_processor(source) or image_processor_doing(input_config(classifier, None), classifier)
    transform = ProcessorTransform(processor)
    rows, skipped = [], {}
    narrowed = at_calibrated_width(classifier, width, calibration_images, transform, batch_size)
    with torch.inference_mode(), narrowed:
        for names, pixels, unread in _batches(files, transform, batch_size):
            skipped.update(unread)
            if names:
                probabilities = logits_of(classifier(pixels), len(names)).float().softmax(1)
                rows += [_row(name, row, labels) for name, row in zip(names, probabilities.cpu(), strict=True)]
    if not rows:
        raise ValueError(f"none of the {len(files)} photos can be read; {files[0]}: {skipped[files[0]]}")
    _write(output, rows, min(TOP, len(labels)))
    return len(rows), skipped


def find_photos(paths: Sequence[str | Path]) -> list[str]:
    """Return the photos that paths name, those in folders by their names; raise a ValueError where there are none."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(image.file for image in read_folder(path).images)
            if not found:
                raise ValueError(f"{path} holds no photos that Pillow can read by their names, such as *.jpg or *.png")
            files += found
        elif path.is_file():
            files.append(str(path))
        else:
            raise ValueError(f"{path} does not exist; give photos, or folders with photos in them")
    return list(dict.fromkeys(files))


def class_labels(source: str, model: nn.Module) -> list[str]:
    """Return the names of a model's classes, as the pipeline of transformers has them."""
    own = isinstance(model, PreTrainedModel)
    config = model.config if own else AutoConfig.from_pretrained(checkpoint_folder(source))
    return [config.id2label[label] for label in range(config.num_labels)]


def at_calibrated_width(
    model: nn.Module,
    width: float | None,
    photos: str | Path | None,
    transform: ProcessorTransform,
    batch_size: int,
) -> AbstractContextManager[Any]:
    """Return the context in which a model is its sub-network of a width, with batch norm recalibrated on photos."""
    if width is None:
        return nullcontext()
    make_slimmable(model)
    has_statistics = any(getattr(m, "running_mean", None) is not None for m in model.modules())
    if has_statistics and photos is None:
        raise ValueError(
            f"width is {width:g}, and the batch norm of {type(model).__name__} needs statistics for it; give a folder "
            "of training photos as calibration_images"
        )
    if not has_statistics:
        return at_width(model, width)
    files = find_photos([photos])
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:CALIBRATION_PHOTOS]
    chosen = [files[index] for index in order.tolist()]
    batches = (pixels for _, pixels, _ in _batches(chosen, transform, batch_size) if pixels is not None)
    return recalibrate_batchnorm(model, width, batches)


def _check(batch_size: int, width: float | None, calibration_images: str | Path | None, output: Path) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if width is not None:
        check_width(width)
    if calibration_images is not None and width is None:
        raise ValueError("calibration_images are for a sub-network; give its width, or leave them out")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"output is {output}; it must be a file in a folder that can be written")


class _Photos(Dataset):
    """Read photos; one that cannot be read is its reason."""

    def __init__(self, files: Sequence[str], transform: ProcessorTransform) -> None:
        self._files, self._transform = files, transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        file = self._files[index]
        try:
            return file, self._transform(decode({"path": file, "bytes": None}, index, file))
        except UnreadableImageError as error:
            return file, str(error.__cause__)


def _batches(
    files: Sequence[str], transform: ProcessorTransform, batch_size: int
) -> Iterator[tuple[list[str], Tensor | None, list[tuple[str, str]]]]:
    """Yield the names and pixels (N, 3, H, W) of the photos of a batch, and those that cannot be read with why."""
    workers = min(8, os.cpu_count() or 1) if len(files) > batch_size else 0
    for batch in DataLoader(_Photos(files, transform), batch_size, num_workers=workers, collate_fn=list):
        read = {file: found for file, found in batch if isinstance(found, Tensor)}
        unread = [(file, found) for file, found in batch if file not in read]
        yield list(read), torch.stack([*read.values()]).to(_device()) if read else None, unread


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _row(file: str, probabilities: Tensor, labels: Sequence[str]) -> list[str]:
    best = probabilities.topk(min(TOP, len(labels)))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [file, *(cell for share, label in pairs for cell in (labels[label], f"{share:.6f}"))]


def _write(output: Path, rows: Iterable[Sequence[str]], top: int) -> None:
    header = ["file", "label", "probability"]
    for place in range(2, top + 1):
        header += [f"label_{place}", f"probability_{place}"]
    partial = output.with_name(f"{output.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    partial.replace(output)
