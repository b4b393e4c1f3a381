"""Another model as the teacher of the sub-networks."""

import torch
from torch import Tensor, nn

from gradaug_hf.objective.logits import logits_of


def check_teacher(teacher: nn.Module, model: nn.Module, subnet_target: str) -> None:
    """Raise a ValueError if a teacher is no model, shares layers with the one that is trained, or is never asked."""
    if not isinstance(teacher, nn.Module):
        raise ValueError(f"teacher is a {type(teacher).__name__}; it must be a model (nn.Module)")
    if set(teacher.modules()) & set(model.modules()):
        raise ValueError(
            f"teacher is a {type(teacher).__name__} that shares layers with the model that is trained, which would be "
            "in evaluation mode; give a copy: copy.deepcopy(model)"
        )
    if subnet_target == "label":
        raise ValueError("teacher is given, but with subnet_target='label' no sub-network learns its prediction")


@torch.no_grad()
def taught(teacher: nn.Module, images: Tensor, num_classes: int | None) -> Tensor:
    """Return the logits of a teacher, brought to the images' device and to evaluation mode."""
    teacher.to(images.device).eval()
    return logits_of(teacher(images), len(images), num_classes)
