"""The kinds of classification: one class for an image, or several; each has a loss of its own for either network."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from torch import Tensor, nn

from gradaug_hf.objective.losses import (
    at_least_float32,
    binary_cross_entropy,
    binary_divergence,
    check_labels,
    check_multi_hot,
    cross_entropy,
    soft_target_divergence,
)

ProblemType = Literal["single_label_classification", "multi_label_classification"]
PROBLEM_TYPES = get_args(ProblemType)
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A kind of classification.

    Args:
        full_loss: returns the loss of the full network, from logits (N, classes) and labels.
        subnet_loss: returns the loss of a sub-network, from its logits and those that it learns, (N, classes) both.
        check_labels: raises a ValueError if labels do not fit the number of classes, None where that is not known.
    """

    full_loss: Loss
    subnet_loss: Loss
    check_labels: Callable[[Tensor, int | None], None]


SINGLE_LABEL = Problem(cross_entropy, soft_target_divergence, check_labels)
MULTI_LABEL = Problem(binary_cross_entropy, binary_divergence, check_multi_hot)
PROBLEMS = dict(zip(PROBLEM_TYPES, (SINGLE_LABEL, MULTI_LABEL), strict=True))


def problem_of(model: nn.Module, given: ProblemType | None = None) -> Problem:
    """Return the kind of classification that a model is trained for.

    Args:
        model: its `config.problem_type`, as models of transformers have it, is set to `given` where it is None.
        given: states it for a model without such a config, as those of timm; None: what the model states, else one
            class for an image.

    Raises:
        ValueError: the model states another one, or none of these.
    """
    config = getattr(model, "config", None)
    stated = getattr(config, "problem_type", None)
    choices = ", ".join(map(repr, PROBLEM_TYPES))
    if stated not in (None, *PROBLEM_TYPES):
        raise ValueError(f"config.problem_type is {stated!r}; GradAug needs one of {choices}")
    if None not in (given, stated) and given != stated:
        raise ValueError(
            f"problem_type is {given!r}, but config.problem_type of this {type(model).__name__} is {stated!r}; set "
            "one of them alone, or both to the same"
        )
    if given is not None and hasattr(config, "problem_type"):
        config.problem_type = given
    return PROBLEMS[given or stated or PROBLEM_TYPES[0]]


def criterion_of(problem: Problem, given: Loss | None = None, label_smoothing: float = 0.0) -> Loss:
    """Return the loss of the full network, from its logits and the labels.

    Args:
        problem: has the loss that is used where none is given.
        given: a user's loss; it gets logits of float32 at least.
        label_smoothing: of the cross-entropy, in [0, 1].

    Raises:
        ValueError: label smoothing is out of its range, or asked for with another loss than the cross-entropy.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing!r}; it must lie in [0, 1]")
    if label_smoothing and (given is not None or problem != SINGLE_LABEL):
        raise ValueError(
            f"label smoothing is {label_smoothing!r}, but only the cross-entropy of one class for an image has it; "
            "set it to 0"
        )
    if given is not None:
        return partial(_loss_given, given)
    return partial(cross_entropy, label_smoothing=label_smoothing) if label_smoothing else problem.full_loss


def _loss_given(criterion: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    loss = criterion(at_least_float32(logits), labels)
    if not isinstance(loss, Tensor) or loss.ndim:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"criterion returned a {found}; expected a tensor without dimensions, the mean over images")
    return loss
