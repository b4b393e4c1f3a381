"""Copy models to the meta device, on which they run without computing anything."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._pytree import tree_leaves

from gradaug_hf.slimming.patching import unpatch
from gradaug_hf.slimming.sync_batchnorm import run_without_gpu

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
# Hooks of these are part of what a model computes: norms of weights, captured features. Others may do anything.
LIBRARIES = ("torch.nn.", "timm.", "transformers.")


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy the structure of a model to the meta device, without its values, a user's hooks and slicing.

    Returns:
        A copy whose parameters and buffers have shapes and dtypes, but no values.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for leaf in (*module.parameters(recurse=False), *module.buffers(recurse=False), *tree_leaves(vars(module))):
            if isinstance(leaf, torch.Tensor):
                memo[id(leaf)] = _without_values(leaf)
    # The memo also keeps the originals' ids valid while they are copied.
    copied = copy_without_hooks(model, memo)
    run_without_gpu(copied)
    return copied


def copy_without_hooks(model: nn.Module, memo: dict[int, object]) -> nn.Module:
    """Copy a model with the hooks that are part of what it computes, without other hooks and slicing.

    Args:
        model: any module; it is left as it is.
        memo: of `copy.deepcopy`; what to take for parts of the model.
    """
    emptied = [(getattr(m, kind), OrderedDict()) for m in model.modules() for kind in FORWARD_HOOKS + BACKWARD_HOOKS]
    memo.update((id(hooks), copied) for hooks, copied in emptied)
    copied_model = copy.deepcopy(model, memo)
    for hooks, copied in emptied:
        copied.update((key, copy.deepcopy(hook, memo)) for key, hook in hooks.items() if _is_of_library(hook))
    return unpatch(copied_model)


def foreign_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the hooks around a module's forward that `meta_copy` leaves out."""
    hooks = [hook for kind in FORWARD_HOOKS for hook in getattr(module, kind).values()]
    return [hook for hook in hooks if not _is_of_library(hook)]


def _is_of_library(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return isinstance(hook, BasePruningMethod) or (hook.__module__ or "").startswith(LIBRARIES)


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty.detach()


def example_images(model: nn.Module, batch: int, size: tuple[int, int, int]) -> torch.Tensor:
    """Return images (batch, channels, height, width) on the meta device, of the dtype that a model computes in."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return torch.empty(batch, *size, dtype=next(dtypes, torch.float32), device="meta")


def example_sizes(model: nn.Module, input_size: int | Sequence[int] | None) -> Iterator[tuple[int, int, int]]:
    """Yield input sizes (channels, height, width) to try a model at, the most likely first.

    Args:
        model: a timm model, a transformers classifier, or any module.
        input_size: side in pixels, (height, width) or (channels, height, width); None finds it out.
    """
    network = getattr(model, "timm_model", model)
    config = getattr(model, "config", None)
    cfg = getattr(network, "pretrained_cfg", None) or {}
    # The configuration of a timm model is that of its checkpoint, which may have had other channels.
    stated = getattr(network, "in_chans", None) or (cfg.get("input_size") or (3,))[0]
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    channels = list(dict.fromkeys([stated, first]))
    if input_size is not None:
        yield from (_full_size(input_size, count) for count in channels)
        return
    own = [getattr(each, "img_size", None) for each in (getattr(network, "patch_embed", None), network)]
    candidates = [*own, getattr(config, "image_size", None), cfg.get("input_size"), 224, 32]
    known = [each for each in candidates if isinstance(each, (int, tuple, list)) and each]
    seen = set()
    for size in (_full_size(each, count) for each in known for count in channels):
        if size not in seen:
            seen.add(size)
            yield size


def _full_size(size: int | Sequence[int], channels: int) -> tuple[int, int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else (size,)
    if not 1 <= len(sides) <= 3 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(
            f"input_size is {size!r}; give a side, (height, width) or (channels, height, width) in pixels"
        )
    if len(sides) == 3:
        return (channels, *sides[1:]) if sides[0] == 3 else sides
    return (channels, *sides) if len(sides) == 2 else (channels, *sides, *sides)
