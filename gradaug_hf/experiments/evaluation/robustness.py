"""Errors of trained models under the fast gradient sign method (FGSM) and ImageNet-C's 15 common corruptions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.hf_argparser import HfArg

from gradaug_hf.data.decoding import UnreadableImageError
from gradaug_hf.experiments.arguments import RecipeParser
from gradaug_hf.experiments.evaluation.corruptions import CORRUPTIONS, SEVERITIES, CorruptedImages, check_corruptions
from gradaug_hf.experiments.evaluation.evaluation import (
    Evaluation,
    EvaluationArguments,
    join_processes,
    short_names,
    topk_hits,
)
from gradaug_hf.experiments.evaluation.measurements import Measurements
from gradaug_hf.reports.plots import DPI, line_style, new_figure
from gradaug_hf.utils.command_line import errors_as_messages
from gradaug_hf.utils.tables import markdown_table

JSON, PLOT = "robustness.json", "robustness.png"
CLEAN = "clean"
Errors = Mapping[str, float]


@dataclass(kw_only=True)
class RobustnessArguments(EvaluationArguments):
    baseline: str | None = HfArg(
        default=None, help="Model that the mean corruption error is relative to; default: none is."
    )
    epsilon: list[float] = HfArg(
        default_factory=lambda: [0.002, 0.004, 0.008, 0.016, 0.032],
        help="How far FGSM moves each pixel, of pixels in 0..1.",
    )
    corruptions: bool = HfArg(default=True, help="Whether to measure the 15 corruptions at their 5 severities.")
    output_dir: str = HfArg(default="outputs/robustness", help="Folder for everything that is written.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("epsilon", all(0 < epsilon <= 1 for epsilon in self.epsilon), "a list of values in (0, 1]")
        self._check("baseline", self.baseline is None or self.corruptions, "left out with --no_corruptions")


def main(description: str | None = None) -> None:
    """Measure the errors of trained models under attacks and corruptions."""
    with errors_as_messages(OSError, ValueError):
        join_processes()
        (args,) = RecipeParser(RobustnessArguments, description=description).parse_args_into_dataclasses()
        others = [args.baseline] if args.baseline is not None and args.baseline not in args.model else []
        evaluation = Evaluation(args, [*others, *args.model])
        if args.corruptions:
            check_corruptions(evaluation.side)
        measurements = evaluation.measurements(JSON)
    with errors_as_messages(UnreadableImageError):
        attack_all(evaluation, measurements, args.epsilon)
        if args.corruptions:
            corrupt_all(evaluation, measurements)
    if evaluation.accelerator.is_main_process:
        report(args, measurements)


def attack_all(evaluation: Evaluation, measurements: Measurements, epsilons: list[float]) -> None:
    """Measure the errors on the images themselves and under FGSM, a model at a time."""
    images = evaluation.images("eval")
    conditions = [CLEAN, *map(fgsm_condition, epsilons)]
    for name, model in evaluation.models.items():
        if all(condition in measurements.of(name) for condition in conditions):
            continue
        hits: list[Tensor] = []
        for pixels, labels in evaluation.batches(images, f"{name}: FGSM"):
            hits.append(evaluation.gather(hits_under_attack(model, pixels, labels, epsilons)))
        errors = 1 - torch.cat(hits).double().mean(0)
        for condition, error in zip(conditions, errors.tolist(), strict=True):
            measurements.add(condition, {name: error})


def hits_under_attack(model: nn.Module, pixels: Tensor, labels: Tensor, epsilons: list[float]) -> Tensor:
    """Return whether the model is right on each image, and on what FGSM makes of it, as booleans (N, 1 + epsilons)."""
    with torch.no_grad():
        images = [pixels, *fgsm(model, pixels, labels, epsilons)]
        return torch.stack([topk_hits(model(image), labels)[:, 0] for image in images], 1)


def corrupt_all(evaluation: Evaluation, measurements: Measurements) -> None:
    """Measure the errors under each corruption and severity, of all models on the same corrupted images."""
    images = evaluation.images("eval")
    for number, corruption in enumerate(CORRUPTIONS, start=1):
        for severity in SEVERITIES:
            condition = corruption_condition(corruption, severity)
            missing = {model: evaluation.models[model] for model in measurements.without(condition)}
            if missing:
                corrupted = CorruptedImages(images, corruption, severity, evaluation.args.seed)
                title = f"{number}/{len(CORRUPTIONS)} {condition}/{len(SEVERITIES)}"
                found = evaluation.accuracies(missing, corrupted, title)
                measurements.add(condition, {model: 1 - top1 for model, (top1, _) in found.items()})


def report(args: RobustnessArguments, measurements: Measurements) -> None:
    """Print the table; write the summary and the plot."""
    folder = Path(args.output_dir)
    errors: dict[str, Mapping[str, float]] = {model: measurements.of(model) for model in measurements.weights}
    if args.corruptions:
        summary: dict[str, object] = {"mean_error": {model: mean_error(own) for model, own in errors.items()}}
        if args.baseline is not None:
            summary["baseline"] = args.baseline
            summary["mean_corruption_error"] = {
                model: mean_corruption_error(own, errors[args.baseline]) for model, own in errors.items()
            }
        measurements.write(**summary)
    names = short_names(list(errors))
    errors = {names[model]: own for model, own in errors.items()}
    baseline = None if args.baseline is None else names[args.baseline]
    (data_name,) = short_names([args.dataset_name]).values()
    plot_robustness(errors, args.epsilon, args.corruptions, folder / PLOT, data_name)
    print(f"\n{data_name}\n\n{robustness_table(errors, args.epsilon, args.corruptions, baseline)}\n")
    print(f"wrote {JSON} and {PLOT} to {folder}")


def fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, epsilons: Sequence[float]) -> Iterator[Tensor]:
    """Yield images that the fast gradient sign method (arXiv 1412.6572) turned against a model, for each epsilon.

    Each pixel moves by epsilon in the direction in which the model's cross-entropy rises. The parameters get no
    gradients.

    Args:
        model: of pixels in 0..1, in eval mode.
        pixels: (N, C, H, W) in 0..1, as those that are yielded.
        labels: (N,), the true classes.
        epsilons: in 0..1, as the pixels.

    Raises:
        ValueError: the model is not in eval mode.
    """
    if model.training:
        raise ValueError("the model is in training mode, in which images change each other; call model.eval()")
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        loss = cross_entropy(model(pixels), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
    for epsilon in epsilons:
        yield (pixels.detach() + epsilon * gradient.sign()).clamp(0, 1)


def fgsm_condition(epsilon: float) -> str:
    """Return the name of the error under the fast gradient sign method."""
    return f"fgsm {epsilon:g}"


def corruption_condition(name: str, severity: int) -> str:
    """Return the name of the error under a corruption."""
    return f"{name} {severity}"


def corruption_errors(errors: Errors) -> dict[str, float]:
    """Return the top-1 error in 0..1 of each corruption, averaged over its severities."""
    return {
        name: fmean(errors[corruption_condition(name, severity)] for severity in SEVERITIES) for name in CORRUPTIONS
    }


def mean_error(errors: Errors) -> float:
    """Return the top-1 error in 0..1, averaged over all corruptions and severities."""
    return fmean(corruption_errors(errors).values())


def mean_corruption_error(errors: Errors, baseline: Errors) -> float | None:
    """Return the mCE of arXiv 1903.12261: each corruption's errors over those of a baseline, averaged over them.

    Returns:
        1 for a model as robust as the baseline; None where the baseline makes no error under a corruption.
    """
    own, reference = corruption_errors(errors), corruption_errors(baseline)
    return fmean(own[name] / reference[name] for name in CORRUPTIONS) if all(reference.values()) else None


def robustness_table(
    errors: Mapping[str, Errors], epsilons: Sequence[float], corruptions: bool, baseline: str | None
) -> str:
    """Return errors of models side by side as a Markdown table."""

    def row(label: str, values: Sequence[float | None]) -> list[str]:
        return [label, *("-" if value is None else f"{100 * value:.2f}" for value in values)]

    models = errors.values()
    rows = [row("no corruption", [own[CLEAN] for own in models])]
    rows += [row(f"FGSM {e:g}", [own[fgsm_condition(e)] for own in models]) for e in epsilons]
    if corruptions:
        means = [corruption_errors(own) for own in models]
        rows += [row(name.replace("_", " "), [own[name] for own in means]) for name in CORRUPTIONS]
        rows.append(row("mean of the corruptions", [mean_error(own) for own in models]))
    if corruptions and baseline is not None:
        relative = [mean_corruption_error(own, errors[baseline]) for own in models]
        rows.append(row(f"mCE, {baseline} = 100", relative))
    return markdown_table(("top-1 error %", *errors), rows)


def plot_robustness(
    errors: Mapping[str, Errors], epsilons: Sequence[float], corruptions: bool, file: Path, title: str
) -> None:
    """Plot the errors of models side by side: against epsilon, against severity, and of each corruption.

    Models differ in line style, marker and lightness, so that colour need not be seen.
    """
    figure = new_figure(figsize=(11, 5.5) if corruptions else (6, 4))
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2) if corruptions else figure.add_gridspec(1, 1)
    attacks = figure.add_subplot(grid[0, 0], xlabel="epsilon of FGSM, pixels in 0..1", ylabel="top-1 error (%)")
    steps = [0, *sorted(epsilons)]
    percent = {model: {name: 100 * error for name, error in own.items()} for model, own in errors.items()}
    styles = [line_style(index, len(errors)) for index in range(len(errors))]
    for (model, own), style in zip(percent.items(), styles, strict=True):
        values = [own[fgsm_condition(epsilon) if epsilon else CLEAN] for epsilon in steps]
        attacks.plot(steps, values, label=model, **style)
    figure.legend(*attacks.get_legend_handles_labels(), loc="outside lower center")
    if corruptions:
        severities = figure.add_subplot(
            grid[1, 0], xlabel="severity, mean of the corruptions", ylabel="top-1 error (%)", xticks=(0, *SEVERITIES)
        )
        each = figure.add_subplot(grid[:, 1], xlabel="top-1 error (%), mean of the severities")
        for own, style in zip(percent.values(), styles, strict=True):
            by_severity = [fmean(own[corruption_condition(name, s)] for name in CORRUPTIONS) for s in SEVERITIES]
            severities.plot((0, *SEVERITIES), [own[CLEAN], *by_severity], **style)
            places = range(len(CORRUPTIONS))
            each.plot(corruption_errors(own).values(), places, **style | {"linestyle": "", "fillstyle": "none"})
        each.set_yticks(range(len(CORRUPTIONS)), [name.replace("_", " ") for name in CORRUPTIONS])
        each.invert_yaxis()
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=DPI)
