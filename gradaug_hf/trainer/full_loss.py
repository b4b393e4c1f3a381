"""The full network's loss: whether the Trainer computes it, a user's function or GradAug."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils.generic import find_labels

from gradaug_hf.hub.configs import timm_network
from gradaug_hf.objective.logits import logits_of
from gradaug_hf.objective.losses import SUM_TOLERANCE
from gradaug_hf.objective.objective import GradAug, Pass
from gradaug_hf.objective.transforms import check_images
from gradaug_hf.trainer.batches import IMAGES, LABELS, split_batch

FullLoss = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Any]]


class PlainLoss:
    """Decide whose loss a batch has that no sub-network sees.

    Methods that are not those of the base class, `full_loss` and `compute_loss`, are a user's.
    """

    def __init__(self, trainer: Trainer, base: type[Trainer]) -> None:
        self._trainer = trainer
        self.model_has_loss = bool(find_labels(type(trainer.model)))
        self.has_own_full_loss = type(trainer).full_loss is not base.full_loss
        self._has_own_compute_loss = type(trainer).compute_loss is not base.compute_loss
        self.was_computed = False  # by the base in this training

    @property
    def is_given(self) -> bool:
        """Return True if the full network's loss is a user's."""
        return self.has_own_full_loss or self._trainer.compute_loss_func is not None

    def is_trainers(self, inputs: Mapping[str, Any] | None = None) -> bool:
        """Return True if the loss is `Trainer`'s, or a user's, as it is without sub-networks and mixing.

        A classifier of images without a loss of its own, such as a timm model, gets cross-entropy even then.

        Args:
            inputs: a batch, which can show that the model is no classifier of images; None before there is one.
        """
        args, model = self._trainer.args, self._trainer.model
        if args.num_subnets > 0 or args.mixup_alpha > 0 or args.cutmix_alpha > 0 or self.has_own_full_loss:
            return False
        is_another = self._has_own_compute_loss if inputs is None else IMAGES not in inputs
        is_users = self._trainer.compute_loss_func is not None and timm_network(model) is None
        return self.model_has_loss or is_users or is_another

    def is_left_to_trainer(self, inputs: Mapping[str, Any]) -> bool:
        """Return True if `Trainer.compute_loss` computes the loss of a batch, by itself or with the model's own."""
        labels = inputs.get(LABELS)
        has_soft_labels = isinstance(labels, Tensor) and labels.is_floating_point()
        is_trainers = self.is_trainers(inputs)
        if is_trainers and has_soft_labels and IMAGES in inputs and self._trainer.compute_loss_func is None:
            is_trainers = not learns_one_class(self._trainer.model, labels)
        return is_trainers or (self.model_has_loss and not has_soft_labels and not self.is_given)

    def warn_if_passed_over(self) -> None:
        """Warn once if a user's `compute_loss` does not call the base's, which runs the sub-networks."""
        if self._trainer.args.num_subnets > 0 and not self.was_computed:
            self.was_computed = True
            warnings.warn(
                f"{type(self._trainer).__name__}.compute_loss does not call that of GradAugTrainer, so that no "
                "sub-network is trained; override full_loss(model, inputs) for another loss of the full network",
                stacklevel=3,
            )


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


class OwnLossGradAug(GradAug):
    """GradAug whose full pass is a function, `full_loss` of a GradAugTrainer, which runs the model as well."""

    def __init__(self, model: nn.Module, *, full_loss: FullLoss, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._full_loss = full_loss

    def _full_pass(self, images: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Pass:
        check_images(images)
        batch = {IMAGES: images, LABELS: labels, **inputs}
        loss, logits = loss_and_logits(self._full_loss, self.model, batch, self.num_classes)
        return Pass(loss, logits.detach())


def loss_and_logits(
    full_loss: FullLoss, model: nn.Module, batch: dict[str, Any], num_classes: int | None
) -> tuple[Tensor, Tensor]:
    """Return the full network's loss of a batch and its logits (N, classes), or raise a ValueError if it has none."""
    found = full_loss(model, batch)
    if not (isinstance(found, tuple) and len(found) == 2):
        owner = type(getattr(full_loss, "__self__", full_loss)).__name__
        raise ValueError(
            f"{owner}.full_loss returned a {type(found).__name__}; expected a tuple of the loss and the output, whose "
            "logits the sub-networks learn"
        )
    loss, output = found
    return loss, logits_of(output, len(split_batch(batch)[1]), num_classes)
