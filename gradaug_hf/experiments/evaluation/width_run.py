"""Accuracy and cost of the sub-networks of trained models, against their width."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader
from transformers.hf_argparser import HfArg

from gradaug_hf.data.decoding import UnreadableImageError, with_pixels
from gradaug_hf.data.loading import take_images
from gradaug_hf.experiments.evaluation.comparison import (
    Evaluation,
    EvaluationArguments,
    join_processes,
    parse_evaluation,
    short_names,
)
from gradaug_hf.experiments.evaluation.measurements import Measurements
from gradaug_hf.experiments.evaluation.pixels import PixelNetwork, pixel_transform, to_unit
from gradaug_hf.experiments.evaluation.width_curves import WidthResult, cpu_latency, plot_widths, widths_side_by_side
from gradaug_hf.hub.folders import check_new
from gradaug_hf.hub.networks import image_processor
from gradaug_hf.hub.subnet_folder import save_subnet
from gradaug_hf.slimming import extract_subnet, make_slimmable, recalibrate_batchnorm, slicing_report
from gradaug_hf.trainer.width_evaluation import CALIBRATION_IMAGES
from gradaug_hf.utils.command_line import errors_as_messages

JSON, PLOT = "subnet_widths.json", "subnet_widths.png"
# The mean of the variances of batches depends on their size.
CALIBRATION_BATCH = 128


@dataclass(kw_only=True)
class WidthArguments(EvaluationArguments):
    widths: list[float] = HfArg(
        default_factory=lambda: [1.0, 0.9, 0.8, 0.7, 0.6, 0.5],
        help="Width multipliers to evaluate at, each in (0, 1].",
    )
    width_divisor: int = HfArg(default=1, help="Numbers of channels are rounded to the nearest multiple of it.")
    export: float | None = HfArg(
        default=None, help="Width multiplier at which the sub-network of each model is written."
    )
    output_dir: str = HfArg(default="outputs/subnet_widths", help="Folder for everything that is written.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("widths", all(0 < width <= 1 for width in self.widths), "a list of widths in (0, 1]")
        self._check("export", self.export is None or 0 < self.export <= 1, "in (0, 1]")
        self._check("width_divisor", self.width_divisor >= 1, "at least 1")


def main(description: str | None = None) -> None:
    """Measure the sub-networks of trained models at several widths."""
    with errors_as_messages(OSError, ValueError):
        join_processes()
        args = parse_evaluation(WidthArguments, description, sys.argv[1:])
        check_exports(args)
        evaluation = Evaluation(args, args.model)
        measurements = evaluation.measurements(JSON, width_divisor=args.width_divisor)
        for name, model in evaluation.models.items():
            slice_model(name, model, evaluation.side, args.width_divisor)
    with errors_as_messages(UnreadableImageError):
        measure_all(evaluation, measurements, args.widths)
    if evaluation.accelerator.is_main_process:
        report(args, measurements)
        with errors_as_messages(ValueError):
            export(evaluation, args)


def measure_all(evaluation: Evaluation, measurements: Measurements, widths: list[float]) -> None:
    """Measure each model at each width at which that was not done yet."""
    for name, model in evaluation.models.items():
        for width in widths:
            if width_key(width) not in measurements.of(name):
                result = measure(evaluation, name, subnet_at(evaluation, model, width), width)
                measurements.add(width_key(width), {name: asdict(result)})


def check_exports(args: WidthArguments) -> None:
    """Make sure that the folders of the sub-networks can be made.

    Raises:
        ValueError: one of them is there, or two models have the same.
    """
    if args.export is None:
        return
    folders = [export_folder(args, model) for model in args.model]
    if len(set(folders)) < len(folders):
        raise ValueError(f"export: two of the models would be written to {max(folders, key=folders.count)}")
    for folder in folders:
        check_new(folder)


def export_folder(args: WidthArguments, model: str) -> Path:
    """Return the folder to which the sub-network of a model is written."""
    return Path(args.output_dir) / f"{Path(model).name}-width{args.export:g}"


def slice_model(name: str, model: PixelNetwork, side: int, width_divisor: int) -> None:
    """Make a model slimmable.

    Raises:
        ValueError: nothing of it can be sliced.
    """
    make_slimmable(model.network, input_size=side, width_divisor=width_divisor)
    found = slicing_report(model)
    if found.sliced_macs == 0:
        reasons = "; ".join(dict.fromkeys(found.refused.values()))
        raise ValueError(f"nothing of model {name!r} can be sliced: {reasons}")


def width_key(width: float) -> str:
    """Return the name of the measurement at a width."""
    return f"width {width:g}"


def subnet_at(evaluation: Evaluation, model: PixelNetwork, width: float) -> PixelNetwork:
    """Return the sub-network of a width as a dense model."""
    with recalibrated(evaluation, model, width):
        return extract_subnet(model, width)


@contextmanager
def recalibrated(evaluation: Evaluation, model: PixelNetwork, width: float) -> Iterator[None]:
    """Give batch norm its own statistics at a narrower width, and keep those of the training at full width."""
    if width == 1:
        yield
    else:
        with recalibrate_batchnorm(model, width, calibration_batches(evaluation)):
            yield


def calibration_batches(evaluation: Evaluation) -> Iterator[Tensor]:
    """Yield pixels of training images as the model is evaluated on, the same on every process."""
    images = take_images(evaluation.data["train"], CALIBRATION_IMAGES, evaluation.args.seed)
    pixels = with_pixels(images, pixel_transform(evaluation.side))
    for batch in DataLoader(pixels, CALIBRATION_BATCH, num_workers=evaluation.args.num_workers):
        yield to_unit(batch["pixel_values"].to(evaluation.accelerator.device))


def measure(evaluation: Evaluation, name: str, subnet: PixelNetwork, width: float) -> WidthResult:
    """Measure accuracy and cost of a dense sub-network."""
    title = f"{name}: {width_key(width)}"
    top1, top5 = evaluation.accuracies({name: subnet}, evaluation.images("eval"), title)[name]
    latency, spread = cpu_latency(copy.deepcopy(subnet).cpu(), evaluation.side)
    counted = slicing_report(evaluation.models[name])
    divisor = evaluation.args.width_divisor
    return WidthResult(top1, top5, counted.macs(width, divisor), counted.params(width, divisor), latency, spread)


def report(args: WidthArguments, measurements: Measurements) -> None:
    """Print the table and write the plot."""
    results = {
        name: {width: WidthResult(**measurements.of(model)[width_key(width)]) for width in args.widths}
        for model, name in short_names(args.model).items()
    }
    (data_name,) = short_names([args.dataset_name]).values()
    plot_widths(results, Path(args.output_dir) / PLOT, data_name)
    print(f"\n{data_name}\n\n{widths_side_by_side(results)}\n")
    print(f"wrote {JSON} and {PLOT} to {args.output_dir}")


def export(evaluation: Evaluation, args: WidthArguments) -> None:
    """Write the sub-network of each model to a folder of its own.

    Raises:
        ValueError: a sub-network cannot be written.
    """
    if args.export is None:
        return
    for name, model in evaluation.models.items():
        folder = export_folder(args, name)
        processor = image_processor(name)
        with recalibrated(evaluation, model, args.export):
            save_subnet(model.network, args.export, folder, processor=processor, input_size=evaluation.side)
        print(f"wrote the sub-network of width {args.export:g} to {folder}, which torch.export loads")
