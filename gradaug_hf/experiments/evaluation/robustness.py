"""Robustness of models: the fast gradient sign method, corruption errors, their table and plot."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradaug_hf.experiments.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from gradaug_hf.reports.plots import DPI, line_style, new_figure
from gradaug_hf.utils.tables import markdown_table

CLEAN = "clean"
Errors = Mapping[str, float]


def fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, epsilons: Sequence[float]) -> Iterator[Tensor]:
    """Yield images that the fast gradient sign method (arXiv 1412.6572) turned against a model, for each epsilon.

    Each pixel moves by epsilon in the direction in which the model's cross-entropy rises. The parameters get no
    gradients.

    Args:
        model: of pixels in 0..1, in eval mode.
        pixels: (N, C, H, W) in 0..1.
        labels: (N,), the true classes.
        epsilons: in 0..1, as the pixels.

    Yields:
        Pixels (N, C, H, W), clipped to 0..1.

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
        name: sum(errors[corruption_condition(name, severity)] for severity in SEVERITIES) / len(SEVERITIES)
        for name in CORRUPTIONS
    }


def mean_error(errors: Errors) -> float:
    """Return the top-1 error in 0..1, averaged over all corruptions and severities."""
    return sum(corruption_errors(errors).values()) / len(CORRUPTIONS)


def mean_corruption_error(errors: Errors, baseline: Errors) -> float | None:
    """Return the mCE of arXiv 1903.12261: each corruption's errors over those of a baseline, averaged over them.

    Returns:
        1 for a model as robust as the baseline; None where the baseline makes no error under a corruption.
    """
    own, reference = corruption_errors(errors), corruption_errors(baseline)
    if not all(reference.values()):
        return None
    return sum(own[name] / reference[name] for name in CORRUPTIONS) / len(CORRUPTIONS)


def robustness_table(
    errors: Mapping[str, Errors], epsilons: Sequence[float], corruptions: bool, baseline: str | None
) -> str:
    """Return errors of models side by side as a Markdown table."""

    def row(label: str, values: Sequence[float | None]) -> list[str]:
        return [label, *("-" if value is None else f"{100 * value:.2f}" for value in values)]

    models = list(errors.values())
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
    steps = sorted(epsilons)
    for index, (model, own) in enumerate(errors.items()):
        values = [own[CLEAN], *(own[fgsm_condition(epsilon)] for epsilon in steps)]
        attacks.plot([0, *steps], _percent(values), label=model, **line_style(index, len(errors)))
    figure.legend(*attacks.get_legend_handles_labels(), loc="outside lower center")
    if corruptions:
        severities = figure.add_subplot(
            grid[1, 0], xlabel="severity, mean of the corruptions", ylabel="top-1 error (%)", xticks=(0, *SEVERITIES)
        )
        each = figure.add_subplot(grid[:, 1], xlabel="top-1 error (%), mean of the severities")
        for index, own in enumerate(errors.values()):
            style = line_style(index, len(errors))
            severities.plot((0, *SEVERITIES), _percent([own[CLEAN], *_by_severity(own)]), **style)
            each.plot(
                _percent(list(corruption_errors(own).values())),
                range(len(CORRUPTIONS)),
                **style | {"linestyle": "", "fillstyle": "none"},
            )
        each.set_yticks(range(len(CORRUPTIONS)), [name.replace("_", " ") for name in CORRUPTIONS])
        each.invert_yaxis()
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=DPI)


def _by_severity(errors: Errors) -> list[float]:
    return [
        sum(errors[corruption_condition(name, severity)] for name in CORRUPTIONS) / len(CORRUPTIONS)
        for severity in SEVERITIES
    ]


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]
