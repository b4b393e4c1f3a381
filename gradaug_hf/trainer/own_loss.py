"""GradAug with the full network's loss that a trainer computes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gradaug_hf.objective.logits import logits_of
from gradaug_hf.objective.objective import GradAug, Pass
from gradaug_hf.objective.transforms import check_images

FullLoss = Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], tuple[Tensor, Any]]


class OwnLossGradAug(GradAug):
    """GradAug whose full pass is a function, which runs the model as well.

    Args:
        model: as for GradAug.
        full_loss: returns the loss of the full network, a scalar, and its output with logits (N, classes), from the
            model, images, labels and further inputs.
        settings: of GradAug.
    """

    def __init__(self, model: nn.Module, *, full_loss: FullLoss, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._full_loss = full_loss

    def _full_pass(self, images: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Pass:
        check_images(images)
        loss, output = self._full_loss(self.model, images, labels, inputs)
        return Pass(loss, logits_of(output, len(labels), self.num_classes).detach())
