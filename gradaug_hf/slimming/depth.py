"""Find the shortcut that remains where a residual block is dropped, and make the blocks droppable.

A residual block is known by its `drop_path`. It gives `act(shortcut(x) + drop_path(residual(x)))`, with a shortcut and
an activation that go by many names. So they are not guessed but tried: with random weights and images a copy of the
block, whose drop paths give zeros, must give exactly what the shortcut and the activation alone do.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gradaug_hf.slimming.meta import copy_without_hooks, example_images, example_sizes, meta_copy
from gradaug_hf.slimming.patching import WidthState, patch, slices_of, unpatch
from gradaug_hf.slimming.shortcuts import Shortcut, run_shortcut
from gradaug_hf.slimming.widths import check_unchanged
from gradaug_hf.utils.randomness import seeded

DROP_PATH = re.compile(r"(.*_)?drop_path\d*")
# Sides in pixels at which blocks are tried first: small, but more than one position in the last stage.
TRIED_SIDES = (64, 128)
# Two images, so that a batch norm over one position still has something to normalise.
TRIED_BATCH = 2


class Call(NamedTuple):
    """Hold the arguments of a block's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Zeros(nn.Module):
    """A drop path that drops every image, and counts how often it was asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.zeros_like(x)


def make_droppable(model: nn.Module, *, input_size: int | Sequence[int] | None = None) -> nn.Module:
    """Patch a model in place so that its residual blocks can be dropped; state dict and outputs do not change.

    Residual blocks are the outermost modules with a `drop_path`, whatever its rate. Dropped, a block is not computed
    but for its shortcut and what follows the sum. Warns of blocks that are never dropped.

    Args:
        model: a timm model, a transformers image classifier, or any module that maps an image batch to logits; it
            may be slimmable, and stays so.
        input_size: side in pixels, (height, width) or (channels, height, width) of images that it can take; None finds
            one.

    Returns:
        The same model.

    Raises:
        ValueError: no block can be dropped, or `input_size` is not positive.

    Examples:
        >>> model = make_droppable(timm.create_model("test_vit"))
        >>> subnets = SubnetSampler(subnet_mode="depth").sample(step=0)
    """
    check_unchanged(model)
    shortcuts, refused = find_shortcuts(model, input_size)
    if not shortcuts:
        reasons = "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:1])
        raise ValueError(
            f"{type(model).__name__} has no residual block with a drop_path that can be dropped{reasons}; its "
            'sub-networks cannot be shallower, use subnet_mode="width"'
        )
    if refused:
        names = ", ".join(f"{name} ({reason})" for name, reason in refused.items())
        warnings.warn(
            f"{len(refused)} of {len(refused) + len(shortcuts)} residual blocks of {type(model).__name__} are never "
            f"dropped: {names}",
            stacklevel=2,
        )
    own = vars(model)
    slices, state, report = slices_of(model), own.get("_width_state") or WidthState(), own.get("_slicing_report")
    unpatch(model)
    patch(model, slices, shortcuts, state)
    if report is not None:
        model._slicing_report = report
    return model


def find_shortcuts(
    model: nn.Module, input_size: int | Sequence[int] | None = None
) -> tuple[dict[str, Shortcut], dict[str, str]]:
    """Return the shortcuts of a model's residual blocks, and why others are never dropped; the model is left as it is.

    Returns:
        Block name -> its shortcut, in order of execution, and block name -> why it is never dropped.
    """
    names = list(residual_blocks(model))
    calls, error = _record_calls(model, names, input_size) if names else ({}, None)
    shortcuts, refused = {}, {}
    for name, call in calls.items():
        with seeded(0):
            found = _find_shortcut(_random_copy(model.get_submodule(name)), call)
        if isinstance(found, str):
            refused[name] = found
        else:
            shortcuts[name] = Shortcut(len(shortcuts), *found)
    reason = f"the model does not run on the meta device: {error}" if error else "it does not run"
    return shortcuts, refused | {name: reason for name in names if name not in calls}


def residual_blocks(model: nn.Module) -> Iterator[str]:
    """Yield the names of the outermost modules with a drop path, the residual blocks of a model."""
    outer = None
    for name, module in model.named_modules():
        if (outer is None or not name.startswith(f"{outer}.")) and next(_drop_paths(module), None):
            outer = name
            yield name


def _drop_paths(module: nn.Module) -> Iterator[str]:
    """Yield the names of a module's own drop paths; with a rate of 0 some models have None instead."""
    for name, value in (*vars(module).items(), *module._modules.items()):
        if DROP_PATH.fullmatch(name) and (value is None or isinstance(value, nn.Module)):
            yield name


@torch.no_grad()
def _record_calls(
    model: nn.Module, names: list[str], input_size: int | Sequence[int] | None
) -> tuple[dict[str, Call], Exception | None]:
    """Return the first call of each block, or the error that the model raised at the first size."""
    network = meta_copy(model).train()
    calls: dict[str, Call] = {}

    def record(name: str, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, Call(args, kwargs))

    for name in names:
        network.get_submodule(name).register_forward_pre_hook(partial(record, name), with_kwargs=True)
    sides = TRIED_SIDES if input_size is None else ()
    first = None
    for size in chain(*(example_sizes(model, side) for side in sides), example_sizes(model, input_size)):
        try:
            network(example_images(network, TRIED_BATCH, size))
            return calls, None
        except Exception as error:  # a model may raise anything at a size that it cannot take
            first = first or error
            calls.clear()
    return {}, first


def _random_copy(block: nn.Module) -> nn.Module:
    """Return a copy of a block in training mode, float64, on the CPU, with random parameters, unpatched."""
    copied = copy_without_hooks(block, {}).train().cpu().double()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.normal_(std=0.5)
    return copied


def _find_shortcut(block: nn.Module, call: Call) -> tuple[str | None, str | None] | str:
    """Return the names of a block's shortcut and of what follows the sum, or why there are none."""
    if not call.args or not isinstance(call.args[0], Tensor):
        return "it is not called with a tensor first"
    if not all(leaf.is_floating_point() for leaf in tree_leaves(call) if isinstance(leaf, Tensor)):
        return "one of its arguments is a tensor of integers"
    for module in list(block.modules()):
        for name in list(_drop_paths(module)):
            setattr(module, name, _Zeros())
    x, *others = tree_map(_random_values, call.args)
    kwargs = tree_map(_random_values, call.kwargs)
    expected = _attempt(lambda: block(x.clone(), *others, **kwargs))
    if expected is None:
        return "it gives no tensor in float64"
    if not any(module.calls for module in block.modules() if isinstance(module, _Zeros)):
        return "it has no shortcut: its drop path is not used"

    def shortcut(path: str | None, act: str | None) -> Tensor | None:
        out = _attempt(lambda: run_shortcut(block, path, act, x.clone()))
        return out if out is not None and out.shape == expected.shape else None

    layers = [name for name, _ in block.named_children() if not DROP_PATH.fullmatch(name)]
    for path in (None, *layers):
        for act in (None, *reversed(layers)) if shortcut(path, None) is not None else ():
            out = shortcut(path, act)
            if out is not None and torch.allclose(out, expected, rtol=1e-10, atol=1e-10):
                return path, act
    return "without its residual branch it gives neither its input nor what its layers make of that"


def _random_values(value: Any) -> Any:
    return torch.randn(value.shape, dtype=torch.float64) if isinstance(value, Tensor) else value


@torch.no_grad()
def _attempt(run: Callable[[], Any]) -> Tensor | None:
    try:
        out = run()
    except Exception:  # not every layer can take what a block is called with
        return None
    return out if isinstance(out, Tensor) else None
