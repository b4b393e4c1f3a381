"""Make models slimmable: trace, plan, prove, patch."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from gradaug_hf.slimming.analysis.handlers import find_handler
from gradaug_hf.slimming.analysis.planning import Plan
from gradaug_hf.slimming.analysis.proof import prove
from gradaug_hf.slimming.analysis.tracing import Trace
from gradaug_hf.slimming.meta import example_images, example_sizes, foreign_hooks, meta_copy
from gradaug_hf.slimming.patching import Slices, WidthState, patch, shortcuts_of, unpatch
from gradaug_hf.slimming.patterns import Width
from gradaug_hf.slimming.report import SlicingReport, make_report
from gradaug_hf.slimming.widths import num_droppable_blocks, width_state

# Two images, so that a batch norm over one position still has something to normalise.
TRACED_BATCH = 2
HOOKED = "it has a hook, which may need every channel; one that is registered after make_slimmable is none of its plan"


def make_slimmable(
    model: nn.Module, *, input_size: int | Sequence[int] | None = None, width_divisor: int = 1
) -> nn.Module:
    """Patch a model in place so that it can run at a width multiplier; its state dict does not change.

    Never fails on a model: what cannot be followed or does not run narrower stays at full width, with a reason in
    `slicing_report(model)`. Calling it again analyses the model anew and sets it to full width.

    Args:
        model: a timm model, a transformers image classifier, or any module that maps an image batch to logits.
        input_size: side in pixels, (height, width) or (channels, height, width) of the images; None takes the
            model's own.
        width_divisor: channel counts are rounded to the nearest multiple of it; 1 is exact to the paper
            (arXiv 2006.07989), 8 suits tensor cores.

    Returns:
        The same model.

    Raises:
        ValueError: `input_size` or `width_divisor` is not positive.

    Examples:
        >>> model = make_slimmable(timm.create_model("test_resnet"))
        >>> with at_width(model, 0.5):
        ...     logits = model(images)
    """
    if not isinstance(width_divisor, int) or width_divisor < 1:
        raise ValueError(f"width_divisor is {width_divisor!r}; it must be a positive integer")
    sizes = list(example_sizes(model, input_size))
    shortcuts = shortcuts_of(model) if num_droppable_blocks(model) else {}
    unpatch(model)
    network = meta_copy(model)
    whole = {name: HOOKED for name, module in model.named_modules() if foreign_hooks(module)}
    slices, report = {}, SlicingReport()
    for size in sizes:
        try:
            plan = _plan(network, example_images(network, TRACED_BATCH, size), whole)
        except Exception as error:  # a model may raise anything at a size that it cannot take
            report.refused.setdefault("", f"does not run on the meta device at {size}: {error}")
            continue
        slices, report = plan.slices(), make_report(network, plan, TRACED_BATCH)
        break
    else:  # what its forward writes to is unknown
        slices = {name: Slices(written=set(m._buffers)) for name, m in model.named_modules() if m._buffers}
    patch(model, slices, shortcuts, WidthState(Width(1.0, width_divisor)))
    model._slicing_report = report
    return model


def _plan(network: nn.Module, example: torch.Tensor, whole: Mapping[str, str]) -> Plan:
    trace = Trace(network, find_handler, whole)
    for training in (True, False):
        trace.run(example, training)
    trace.fix_unused()
    plan = Plan(trace)
    prove(plan, example)
    return plan


def slicing_report(model: nn.Module) -> SlicingReport:
    """Return which layers of a slimmable model are sliced, and why the others are not; printing it gives a table.

    Args:
        model: a model that `make_slimmable` was called on, or a wrapper of one.

    Raises:
        ValueError: the model is not slimmable, or was changed since.

    Examples:
        >>> slicing_report(make_slimmable(model)).sliced_macs > 0.9
        True
    """
    width_state(model)
    return next(vars(module)["_slicing_report"] for module in model.modules() if "_slicing_report" in vars(module))
