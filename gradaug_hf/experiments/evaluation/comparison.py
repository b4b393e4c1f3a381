"""What the recipes share that evaluate trained networks: arguments, data, networks and accuracy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from datasets import DatasetDict
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from gradaug_hf.data.decoding import with_pixels
from gradaug_hf.data.loading import class_names, load_image_data, take_images
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
from gradaug_hf.utils.threads import use_all_cores

# Settings on which what is measured does not depend.
WITHOUT_EFFECT = ("model", "output_dir", "batch_size", "num_workers")
Arguments = TypeVar("Arguments", bound="EvaluationArguments")


@dataclass
class EvaluationArguments:
    """What a recipe needs to know to evaluate trained networks on a data set.

    Raises:
        ValueError: a field is out of its range.
    """

    model: list[str] = field(
        metadata={
            "help": (
                "Trained networks: Hub ids or folders of timm or transformers, or names of timm's pretrained ones. "
                "May be given several times."
            ),
            "action": "extend",
        }
    )
    dataset_name: str = field(
        metadata={"help": "Hub id, parquet file, folder of parquet files, or folder of images sorted by class."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of images; found if not given."})
    label_column: str | None = field(default=None, metadata={"help": "Column of classes; found if not given."})
    train_split: str = field(default="train", metadata={"help": "Split that the networks were trained on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; by default `validation`, else `test`."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Number of images to evaluate on, drawn from the seed; default: all."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; by default that of the networks."}
    )
    batch_size: int = field(default=50, metadata={"help": "Images in a batch, on each process."})
    num_workers: int = field(default=2, metadata={"help": "Processes that read images, for each process."})
    seed: int = field(default=0, metadata={"help": "Seed of all that is drawn."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder for everything that is written."})

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_eval_samples", "image_size"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1")
        for name in ("num_workers", "seed"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("model", len(set(self.model)) == len(self.model), "a list of different networks")

    def _check(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")


def parse_evaluation(kind: type[Arguments], description: str | None, argv: Sequence[str]) -> Arguments:
    """The arguments of a run.

    Args:
        kind: dataclass of the arguments.
        description: shown by --help.
        argv: flags.

    Raises:
        ValueError: an argument is out of its range.
        SystemExit: a flag is not known, or its value has a wrong type.
    """
    (args,) = HfArgumentParser(kind, description=description).parse_args_into_dataclasses(argv)
    return args


def join_processes() -> None:
    """Let the processes of a launcher know each other, also without an accelerator, and share the cores."""
    PartialState(cpu=not torch.accelerator.is_available())
    use_all_cores()


class Evaluation:
    """Networks and the images to evaluate them on.

    Args:
        args: the arguments.
        models: the networks, as for `gradaug_hf.hub.networks.load_network`.

    Raises:
        OSError: the data set cannot be found, reached or read.
        ValueError: the networks do not fit the data or each other, or what is found could not be written or drawn.
    """

    def __init__(self, args: EvaluationArguments, models: Sequence[str]):
        check_plots()
        check_writable(args.output_dir)
        self.args = args
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.data = first_on_main_process(lambda: _load_data(args))
        classes = len(class_names(self.data))
        self.networks = {model: load_pixel_network(model, classes) for model in models}
        self.side = args.image_size or _common_side(self.networks)
        for network in self.networks.values():
            network.to(self.accelerator.device)

    def images(self, split: str) -> Dataset:
        """Examples of `pixel_values`, a uint8 tensor (3, side, side), and `labels`, an int.

        Args:
            split: `train` or `eval`.
        """
        return with_pixels(self.data[split], pixel_transform(self.side))

    def measurements(self, name: str, **settings: Any) -> Measurements:
        """What is measured, in a file of the output folder.

        Args:
            name: of the file.
            settings: on which the measurements depend beside those of `EvaluationArguments`.

        Raises:
            ValueError: the file holds measurements with other settings.
        """
        shared = {f.name for f in fields(EvaluationArguments)}.difference(WITHOUT_EFFECT)
        settings = {key: getattr(self.args, key) for key in sorted(shared)} | {"image_size": self.side} | settings
        return Measurements(
            Path(self.args.output_dir) / name,
            settings,
            {model: weights_digest(network) for model, network in self.networks.items()},
            self.accelerator.device,
            self.accelerator.is_main_process,
        )

    def batches(self, images: Dataset, description: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of pixels (N, 3, side, side) in 0..1 and labels (N,), those of this process, with a progress bar.

        Args:
            images: examples of `pixel_values` and `labels`.
            description: shown by the bar.
        """
        loader = DataLoader(images, self.args.batch_size, num_workers=self.args.num_workers)
        loader = self.accelerator.prepare_data_loader(loader)
        for batch in tqdm(loader, description, leave=False, disable=not self.accelerator.is_main_process):
            yield to_unit(batch["pixel_values"]), batch["labels"]

    def gather(self, values: Tensor) -> Tensor:
        """The values (N, ...) of a batch of all processes, those of each image once."""
        return self.accelerator.gather_for_metrics(values)

    @torch.inference_mode()
    def accuracies(
        self, networks: Mapping[str, nn.Module], images: Dataset, description: str
    ) -> dict[str, tuple[float, float]]:
        """Top-1 and top-5 accuracy in 0..1 of each network, all of which see the same pixels.

        Args:
            networks: of pixels in 0..1, by name.
            images: examples of `pixel_values` and `labels`.
            description: shown by the progress bar.
        """
        hits: dict[str, list[Tensor]] = {name: [] for name in networks}
        for pixels, labels in self.batches(images, description):
            for name, network in networks.items():
                hits[name].append(self.gather(topk_hits(network(pixels), labels)))
        return {name: tuple(torch.cat(rows).double().mean(0).tolist()) for name, rows in hits.items()}


def topk_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is the best of the logits and among the five best, as booleans (N, 2).

    Args:
        logits: (N, classes).
        labels: (N,).
    """
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack([hits[:, 0], hits.any(1)], 1)


def check_plots() -> None:
    """Raise a ValueError where matplotlib is not installed, with which the results are drawn."""
    if not can_plot():
        raise ValueError(NEEDS_MATPLOTLIB)


def _load_data(args: EvaluationArguments) -> DatasetDict:
    data = load_image_data(
        args.dataset_name,
        config_name=args.dataset_config_name,
        train_split=args.train_split,
        eval_split=args.eval_split,
        image_column=args.image_column,
        label_column=args.label_column,
        seed=args.seed,
    )
    if args.max_eval_samples is not None:
        data["eval"] = take_images(data["eval"], args.max_eval_samples, args.seed)
    return data


def _common_side(networks: Mapping[str, PixelNetwork]) -> int:
    sides = {model: native_side(network) for model, network in networks.items()}
    if len(set(sides.values())) > 1:
        found = ", ".join(f"{side} ({model})" for model, side in sides.items())
        raise ValueError(f"the networks are made for images of different sides: {found}; give image_size")
    return next(iter(sides.values()))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Name of a network or data set -> how tables and plots call it: a folder by its last part if that is unique.

    Args:
        names: folders or Hub ids, all different.
    """
    short = [Path(name).resolve().name if Path(name).exists() else name for name in names]
    return {name: own if short.count(own) == 1 else name for name, own in zip(names, short, strict=True)}
