"""GradAug with the full network's loss that a trainer computes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gradaug_hf.objective.logits import logits_of
from gradaug_hf.objective.objective import GradAug, Pass
from gradaug_hf.objective.transforms import check_images
from gradaug_hf.trainer.batches import IMAGES, LABELS, split_batch

FullLoss = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Any]]


class OwnLossGradAug(GradAug):
    """GradAug whose full pass is a function, which runs the model as well.

    Args:
        model: as for GradAug.
        full_loss: `full_loss` of a GradAugTrainer.
        settings: of GradAug.
    """

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
    """Return the full network's loss of a batch and its logits (N, classes).

    Raises:
        ValueError: `full_loss` returned something else.
    """
    found = full_loss(model, batch)
    if not (isinstance(found, tuple) and len(found) == 2):
        owner = type(getattr(full_loss, "__self__", full_loss)).__name__
        raise ValueError(
            f"{owner}.full_loss returned a {type(found).__name__}; expected a tuple of the loss and the output, whose "
            "logits the sub-networks learn"
        )
    loss, output = found
    return loss, logits_of(output, len(split_batch(batch)[1]), num_classes)
