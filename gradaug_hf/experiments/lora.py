"""Adapters of low rank (arXiv 2106.09685) in a pretrained model, by peft; they are merged into what is saved."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradaug_hf.experiments.backbone import run_once
from gradaug_hf.hub.networks import head_parameters

ADAPTED = (nn.Linear, nn.Conv2d)
# Norms are trained as well, so that those with statistics go on as in any training with sub-networks.
NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def add_adapters(model: nn.Module, rank: int, input_size: tuple[int, int, int]) -> None:
    """Add an adapter to each linear and convolutional layer of a backbone, and train adapters, norms and classifier.

    Raises:
        ValueError: peft is not installed, or the model has no layer for an adapter or names no classifier.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"lora_rank is {rank}, which needs peft: pip install peft") from error
    heads = head_parameters(model)
    names = [name for name in _called_layers(model, input_size) if f"{name}.weight" not in heads]
    if not names:
        raise ValueError(f"lora_rank is {rank}, but {type(model).__name__} has no layer that could have an adapter")
    targets = "|".join(map(re.escape, names))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)
    norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in heads or ".lora_" in name or id(parameter) in norms


def _called_layers(model: nn.Module, input_size: tuple[int, int, int]) -> list[str]:
    """Return the names of plain layers whose forward runs; the weights of others are read, past any adapter."""
    called: set[nn.Module] = set()
    named = [(name, m) for name, m in model.named_modules() if type(m) in ADAPTED and getattr(m, "groups", 1) == 1]
    hooks = [layer.register_forward_hook(lambda layer, *given: called.add(layer)) for _, layer in named]
    try:
        run_once(model, input_size)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, layer in named if layer in called]


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model has adapters."""
    return any(True for _ in _adapters(model))


def _adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def adapted_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model that its training changes: adapters, norms with their statistics, classifier."""
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in fixed}


def merge_adapters(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """Replace each layer that has an adapter by a plain one of the same outputs.

    Returns:
        Name of a layer -> the layer with its adapter, and its weight without, to go back to them.
    """
    replaced = {}
    for name, layer in list(_adapters(model)):
        plain = layer.get_base_layer()
        weight = plain._parameters["weight"]
        replaced[name] = layer, weight.data
        weight.data = weight.data + layer.get_delta_weight("default").to(weight.dtype)
        model.set_submodule(name, plain)
    return replaced


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Have the adapters of a model merged for a while; afterwards all is as before, bit for bit."""
    replaced = merge_adapters(model)
    try:
        yield
    finally:
        for name, (layer, weight) in replaced.items():
            layer.get_base_layer()._parameters["weight"].data = weight
            model.set_submodule(name, layer)
