"""Errors of trained models under the fast gradient sign method (FGSM) and ImageNet-C's 15 common corruptions."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.hf_argparser import HfArg

from gradaug_hf.data.decoding import UnreadableImageError
from gradaug_hf.experiments.evaluation.comparison import (
    Evaluation,
    EvaluationArguments,
    join_processes,
    parse_evaluation,
    short_names,
    topk_hits,
)
from gradaug_hf.experiments.evaluation.corruptions import CORRUPTIONS, SEVERITIES, CorruptedImages, check_corruptions
from gradaug_hf.experiments.evaluation.measurements import Measurements
from gradaug_hf.experiments.evaluation.robustness import (
    CLEAN,
    corruption_condition,
    fgsm,
    fgsm_condition,
    mean_corruption_error,
    mean_error,
    plot_robustness,
    robustness_table,
)
from gradaug_hf.utils.command_line import errors_as_messages

JSON, PLOT = "robustness.json", "robustness.png"


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
        args = parse_evaluation(RobustnessArguments, description, sys.argv[1:])
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
                corrupted: Dataset = CorruptedImages(images, corruption, severity, evaluation.args.seed)
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
