"""Accuracy and cost of the sub-networks of trained models, against their width."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import thread_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from transformers.hf_argparser import HfArg

from gradaug_hf.data.decoding import UnreadableImageError, with_pixels
from gradaug_hf.data.loading import take_images
from gradaug_hf.experiments.arguments import RecipeParser
from gradaug_hf.experiments.evaluation.evaluation import Evaluation, EvaluationArguments, join_processes, short_names
from gradaug_hf.experiments.evaluation.measurements import Measurements
from gradaug_hf.experiments.evaluation.pixels import PixelNetwork, pixel_transform, to_unit
from gradaug_hf.experiments.results import percent
from gradaug_hf.hub.folders import check_new
from gradaug_hf.hub.networks import image_processor
from gradaug_hf.hub.subnet_folder import save_subnet
from gradaug_hf.reports.plots import DPI, line_style, new_figure
from gradaug_hf.slimming import extract_subnet, make_slimmable, recalibrate_batchnorm, slicing_report
from gradaug_hf.trainer.width_evaluation import CALIBRATION_IMAGES
from gradaug_hf.utils.command_line import errors_as_messages
from gradaug_hf.utils.tables import markdown_table

JSON, PLOT = "subnet_widths.json", "subnet_widths.png"
# The mean of the variances of batches depends on their size.
CALIBRATION_BATCH = 128
# Seconds for which a model is run to time it.
TIMED = 1.0


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
        self._check_least(1, "width_divisor")


@dataclass(frozen=True)
class WidthResult:
    """Accuracy and cost of a sub-network.

    Args:
        top1: Top-1 accuracy in 0..1.
        top5: Top-5 accuracy in 0..1; None with five classes or fewer.
        macs: Multiply-adds for one image.
        params: Number of parameters.
        latency: Median computing time of one image on one CPU thread, in milliseconds.
        latency_spread: Interquartile range of these times, in milliseconds.
    """

    top1: float
    top5: float | None
    macs: int
    params: int
    latency: float
    latency_spread: float


def main(description: str | None = None) -> None:
    """Measure the sub-networks of trained models at several widths."""
    with errors_as_messages(OSError, ValueError):
        join_processes()
        (args,) = RecipeParser(WidthArguments, description=description).parse_args_into_dataclasses()
        check_exports(args)
        evaluation = Evaluation(args, args.model)
        measurements = evaluation.measurements(JSON, width_divisor=args.width_divisor)
        for name, model in evaluation.models.items():
            slice_model(name, model, evaluation.side, args.width_divisor)
    with errors_as_messages(UnreadableImageError):
        for name, model in evaluation.models.items():
            for width in args.widths:
                if width_key(width) not in measurements.of(name):
                    result = measure(evaluation, name, subnet_at(evaluation, model, width), width)
                    measurements.add(width_key(width), {name: asdict(result)})
    if evaluation.accelerator.is_main_process:
        report(args, measurements)
        with errors_as_messages(ValueError):
            export(evaluation, args)


def check_exports(args: WidthArguments) -> None:
    """Raise a ValueError where the folder of a sub-network is there, or two models have the same one."""
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
    """Make a model slimmable; raise a ValueError where nothing of it can be sliced."""
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


def recalibrated(evaluation: Evaluation, model: PixelNetwork, width: float) -> AbstractContextManager[Any]:
    """Return the context in which batch norm has its own statistics at a narrower width; the full one keeps its."""
    if width == 1:
        return nullcontext()
    return recalibrate_batchnorm(model, width, calibration_batches(evaluation))


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
    """Write the sub-network of each model to a folder of its own."""
    if args.export is None:
        return
    for name, model in evaluation.models.items():
        folder = export_folder(args, name)
        processor = image_processor(name)
        with recalibrated(evaluation, model, args.export):
            save_subnet(model.network, args.export, folder, processor=processor, input_size=evaluation.side)
        print(f"wrote the sub-network of width {args.export:g} to {folder}, which torch.export loads")


@torch.inference_mode()
def cpu_latency(model: nn.Module, side: int) -> tuple[float, float]:
    """Return median and interquartile range of the time of one image on one CPU thread, in milliseconds.

    It is the time that the thread computes, which on an idle machine is the latency; other work does not add to it.
    """
    images = torch.rand(1, 3, side, side)
    timer = Timer("model(images)", timer=thread_time, globals={"model": model, "images": images})
    times = timer.blocked_autorange(min_run_time=TIMED)
    return 1000 * times.median, 1000 * times.iqr


def widths_side_by_side(results: Mapping[str, Mapping[float, WidthResult]]) -> str:
    """Return results as a Markdown table, those of a width below each other."""
    header = ("model", "width", "top-1 %", "top-5 %", "multiply-adds (M)", "parameters (k)", "ms per image")
    rows = [
        (
            model,
            f"{width:g}",
            percent(own[width].top1),
            percent(own[width].top5),
            f"{own[width].macs / 1e6:.2f}",
            f"{own[width].params / 1e3:.1f}",
            f"{own[width].latency:.2f} ± {own[width].latency_spread:.2f}",
        )
        for width in next(iter(results.values()))
        for model, own in results.items()
    ]
    return markdown_table(header, rows)


def plot_widths(results: Mapping[str, Mapping[float, WidthResult]], file: Path, title: str) -> None:
    """Plot top-1 accuracy against width, multiply-adds, parameters and latency, a curve for each model.

    Curves differ in line style, marker and lightness, so that colour need not be seen.
    """
    figure = new_figure(figsize=(11, 7))
    figure.suptitle(title)
    panels = figure.subplots(2, 2, sharey=True)
    for index, (model, own) in enumerate(results.items()):
        found = own.values()
        costs = {
            "width": list(own),
            "multiply-adds (M)": [result.macs / 1e6 for result in found],
            "parameters (k)": [result.params / 1e3 for result in found],
            "ms per image on one CPU thread": [result.latency for result in found],
        }
        top1, style = [100 * result.top1 for result in found], line_style(index, len(results))
        for axes, (label, values) in zip(panels.flat, costs.items(), strict=True):
            axes.plot(values, top1, label=model, **style)
            axes.set(xlabel=label)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set(ylabel="top-1 accuracy (%)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(file, dpi=DPI)
