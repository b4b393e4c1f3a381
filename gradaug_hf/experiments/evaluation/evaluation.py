"""Arguments, data, models and accuracy of the recipes that evaluate trained models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import DatasetDict
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from gradaug_hf.data.decoding import with_pixels
from gradaug_hf.data.loading import check_one_class, class_names, load_image_data, take_images
from gradaug_hf.experiments.arguments import DataArguments
from gradaug_hf.experiments.evaluation.measurements import Measurements
from gradaug_hf.experiments.evaluation.pixels import (
    PixelNetwork,
    load_pixel_network,
    native_side,
    pixel_transform,
    to_unit,
    weights_digest,
)
from gradaug_hf.experiments.run import first_on_main_process
from gradaug_hf.reports.plots import NEEDS_MATPLOTLIB, can_plot
from gradaug_hf.trainer.checks import check_writable
from gradaug_hf.trainer.ranges import check_side
from gradaug_hf.utils.launch import use_all_cores

# Settings on which what is measured does not depend.
WITHOUT_EFFECT = ("model", "output_dir", "batch_size", "num_workers")


@dataclass(kw_only=True)
class EvaluationArguments(DataArguments):
    """Arguments of a recipe that evaluates trained models on a dataset."""

    model: list[str] = HfArg(
        help="Trained models: Hub ids or folders of timm or transformers, or names of timm's pretrained ones. May "
        "be given several times.",
        metadata={"action": "extend"},
    )
    dataset_name: str = HfArg(
        help="Hub id, parquet file, folder of parquet files, or folder of images sorted by class."
    )
    image_size: int | None = HfArg(default=None, help="Side of the images in pixels; by default that of the models.")
    batch_size: int = HfArg(default=50, help="Images in a batch, on each process.")
    num_workers: int = HfArg(default=2, help="Processes that read images, for each process.")
    seed: int = HfArg(default=0, help="Seed of images and corruptions.")
    output_dir: str = HfArg(default="outputs/evaluation", help="Folder for everything that is written.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "batch_size", "image_size")
        self._check_least(0, "num_workers", "seed")
        if self.image_size is not None:
            check_side("image_size", self.image_size)
        self._check_texts()
        self._check("model", len(set(self.model)) == len(self.model), "a list of different models")


def join_processes() -> None:
    """Let the processes of a launcher know each other, also without an accelerator, and share the cores."""
    PartialState(cpu=not torch.accelerator.is_available())
    use_all_cores()


class Evaluation:
    """Models, by names that `load_network` takes, and the images to evaluate them on.

    Raises:
        OSError: the dataset cannot be found, reached or read.
        ValueError: the models do not fit the data or each other, or the output could not be written or plotted.
    """

    def __init__(self, args: EvaluationArguments, models: Sequence[str]):
        check_plots()
        check_writable(args.output_dir)
        self.args = args
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.data = first_on_main_process(lambda: _load_data(args))
        classes = class_names(self.data)
        self.models = {name: load_pixel_network(name, classes) for name in models}
        self.side = args.image_size or _common_side(self.models)
        for model in self.models.values():
            model.to(self.accelerator.device)

    def images(self, split: str) -> Dataset:
        """Return examples of `pixel_values`, a uint8 tensor (3, side, side), and `labels`, an int."""
        return with_pixels(self.data[split], pixel_transform(self.side))

    def measurements(self, name: str, **settings: Any) -> Measurements:
        """Return the measurements kept in a file of the output folder, which must have the same settings."""
        shared = {f.name for f in fields(EvaluationArguments)}.difference(WITHOUT_EFFECT)
        settings = {key: getattr(self.args, key) for key in sorted(shared)} | {"image_size": self.side} | settings
        return Measurements(
            Path(self.args.output_dir) / name,
            settings,
            {name: weights_digest(model) for name, model in self.models.items()},
            self.accelerator.device,
            self.accelerator.is_main_process,
        )

    def batches(self, images: Dataset, description: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's batches of pixels (N, 3, side, side) in 0..1 and labels (N,), with a progress bar."""
        loader = DataLoader(images, self.args.batch_size, num_workers=self.args.num_workers)
        loader = self.accelerator.prepare_data_loader(loader)
        for batch in tqdm(loader, description, leave=False, disable=not self.accelerator.is_main_process):
            yield to_unit(batch["pixel_values"]), batch["labels"]

    def gather(self, values: Tensor) -> Tensor:
        """Gather the values (N, ...) of a batch from all processes, those of each image once."""
        return self.accelerator.gather_for_metrics(values)

    @torch.inference_mode()
    def accuracies(
        self, models: Mapping[str, nn.Module], images: Dataset, description: str
    ) -> dict[str, tuple[float, float | None]]:
        """Measure top-1 and, with more than five classes, top-5 accuracy of models that see the same pixels."""
        hits: dict[str, list[Tensor]] = {name: [] for name in models}
        for pixels, labels in self.batches(images, description):
            for name, model in models.items():
                hits[name].append(self.gather(topk_hits(model(pixels), labels)))
        shares = {name: torch.cat(rows).double().mean(0).tolist() for name, rows in hits.items()}
        few = len(class_names(self.data)) <= 5  # so that every label is among the best five
        return {name: (top1, None if few else top5) for name, (top1, top5) in shares.items()}


def topk_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return whether each label (N,) has the highest logit, and one of the five highest, as booleans (N, 2)."""
    if logits.isnan().any():
        raise ValueError("logits are NaN, so that no class is the largest: the images or the activations overflow")
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack([hits[:, 0], hits.any(1)], 1)


def check_plots() -> None:
    """Raise a ValueError where matplotlib is not installed, which plots the results."""
    if not can_plot():
        raise ValueError(NEEDS_MATPLOTLIB)


def _load_data(args: EvaluationArguments) -> DatasetDict:
    data = load_image_data(args.dataset_name, **args.loading_options(), seed=args.seed)
    check_one_class(data)
    data["eval"] = take_images(data["eval"], args.max_eval_samples, args.seed)
    return data


def _common_side(models: Mapping[str, PixelNetwork]) -> int:
    sides = {name: native_side(model) for name, model in models.items()}
    if len(set(sides.values())) > 1:
        found = ", ".join(f"{side} ({name})" for name, side in sides.items())
        raise ValueError(f"the models are made for images of different sides: {found}; give image_size")
    return next(iter(sides.values()))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return the short name of each model or dataset for tables and plots: a folder's last part if that is unique."""
    short = [Path(name).resolve().name if Path(name).exists() else name for name in names]
    return {name: own if short.count(own) == 1 else name for name, own in zip(names, short, strict=True)}
