"""The pretrained model of a fine-tuning: loaded for other classes and another size, frozen or not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig

from gradaug_hf.hub.networks import accepted_arguments, checkpoint_folder, head_parameters, load_checkpoint

# Deviation of the weights of a new classifier. timm's own is larger the fewer classes there are: 0.4 with two of an
# EfficientNet, whose loss is then about 5 at first.
HEAD_DEVIATION = 0.01


def load_backbone(source: str, class_names: Sequence[str], side: int | None = None) -> nn.Module:
    """Return a pretrained model for the classes of a dataset; where they are as many, it keeps its classifier."""
    model = load_checkpoint(source, class_names, size_arguments(source, side))
    if AutoConfig.from_pretrained(checkpoint_folder(source)).num_labels != len(class_names):
        start_evenly(model)
    return model


def start_evenly(model: nn.Module) -> None:
    """Give the classifier of a model small weights, so that no class is preferred at first."""
    heads = {id(dict(model.named_parameters())[name]) for name in head_parameters(model)}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module.weight) in heads:
            nn.init.normal_(module.weight, std=HEAD_DEVIATION)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def size_arguments(source: str, side: int | None) -> dict[str, Any]:
    """Return the arguments with which a timm model with position embeddings takes images of several sizes."""
    accepted = accepted_arguments(source)
    arguments = {"img_size": side} if side is not None and "img_size" in accepted else {}
    return arguments | ({"dynamic_img_size": True} if "dynamic_img_size" in accepted else {})


def run_once(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Run a model on one image, as in evaluation."""
    was_training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *input_size))
    finally:
        model.train(was_training)


def check_side(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> None:
    """Raise a ValueError where a model does not take images of a size."""
    try:
        run_once(model, input_size)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"image_size is {input_size[-1]}, which {name} does not take: {error}; leave image_size out for its own"
        ) from error


def freeze_backbone(model: nn.Module) -> None:
    """Train the classifier of a model alone."""
    heads = head_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in heads


def batch_norms(model: nn.Module, only_frozen: bool = False) -> list[nn.Module]:
    """Return the batch norms of a model, or only those whose parameters are not trained."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not only_frozen:
        return norms
    return [norm for norm in norms if norm.affine and not norm._parameters["weight"].requires_grad]
