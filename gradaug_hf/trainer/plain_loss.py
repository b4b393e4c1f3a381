"""The loss of a batch that no sub-network sees: whether the Trainer computes it, or GradAug."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from gradaug_hf.hub.configs import timm_network
from gradaug_hf.objective.losses import SUM_TOLERANCE
from gradaug_hf.trainer.batches import IMAGES, LABELS
from gradaug_hf.trainer.config import GradAugConfig


@dataclass(frozen=True)
class PlainLoss:
    """Decide whose loss a batch has that no sub-network sees.

    Args:
        args: the settings.
        model_has_loss: whether the model returns a loss itself.
        compute_loss_func: of the Trainer, a user's; None: there is none.
        has_own_full_loss: whether a subclass of the trainer has a `full_loss` of its own.
        has_own_compute_loss: whether it has a `compute_loss` of its own.
    """

    args: GradAugConfig
    model_has_loss: bool
    compute_loss_func: Callable | None
    has_own_full_loss: bool
    has_own_compute_loss: bool

    @property
    def is_given(self) -> bool:
        """Return True if the full network's loss is a user's."""
        return self.has_own_full_loss or self.compute_loss_func is not None

    def is_trainers(self, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> bool:
        """Return True if the loss is `Trainer`'s, or a user's, as it is without sub-networks and mixing.

        A classifier of images without a loss of its own, such as a timm model, gets cross-entropy even then.

        Args:
            model: the model, not wrapped.
            inputs: a batch, which can show that it is no classifier of images; None before there is one.
        """
        args = self.args
        if args.num_subnets > 0 or args.mixup_alpha > 0 or args.cutmix_alpha > 0 or self.has_own_full_loss:
            return False
        is_another = self.has_own_compute_loss if inputs is None else IMAGES not in inputs
        is_users = self.compute_loss_func is not None and timm_network(model) is None
        return self.model_has_loss or is_users or is_another

    def is_left_to_trainer(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Return True if `Trainer.compute_loss` computes the loss of a batch, by itself or with the model's own."""
        labels = inputs.get(LABELS)
        has_soft_labels = isinstance(labels, Tensor) and labels.is_floating_point()
        is_trainers = self.is_trainers(model, inputs)
        if is_trainers and has_soft_labels and IMAGES in inputs and self.compute_loss_func is None:
            is_trainers = not learns_one_class(model, labels)
        return is_trainers or (self.model_has_loss and not has_soft_labels and not self.is_given)


def learns_one_class(model: nn.Module, labels: Tensor) -> bool:
    """Return True if a model of transformers states that float labels are the probabilities of one class each.

    Its own loss takes them for several classes, and that of `problem_type="single_label_classification"` takes none. A
    first batch of probabilities is warned of where nothing is stated.
    """
    if not isinstance(model, PreTrainedModel) or labels.ndim != 2 or labels.shape[1] < 2:
        return False
    stated = getattr(model.config, "problem_type", None)  # set by the loss of the first batch, if it was not
    if stated is None and ((labels.sum(dim=1) - 1).abs() <= SUM_TOLERANCE).all():
        warnings.warn(
            f"the labels of a batch are probabilities, but problem_type of this {type(model).__name__} is not set: "
            "without sub-networks its own loss takes them for several independent classes. For the cross-entropy "
            'that GradAug has, set config.problem_type="single_label_classification"',
            stacklevel=5,
        )
    return stated == "single_label_classification"
