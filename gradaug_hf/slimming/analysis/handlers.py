"""Derive the axes of an ATen operation's result from those of its arguments: one small handler for each kind."""

from collections.abc import Callable, Sequence

import torch
from timm import layers
from torch import nn

from gradaug_hf.slimming.analysis.axes import (
    Axis,
    Unit,
    axis_of,
    axis_size,
    concat,
    fix,
    fixed,
    free_units,
    product,
    split,
    tie,
    unflatten,
)
from gradaug_hf.slimming.analysis.tracing import Axes, Call, Trace, tensors_in

aten = torch.ops.aten
Handler = Callable[[Trace, Call], None]
HANDLERS: dict[torch._ops.OpOverloadPacket, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register the decorated function as the handler of the ATen operations of these names that PyTorch has."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update({getattr(aten, name): handler for name in names if hasattr(aten, name)})
        return handler

    return register


def find_handler(operation: torch._ops.OpOverload) -> Handler | None:
    """Return the handler of an operation; every operation that PyTorch tags as pointwise has one."""
    handler = HANDLERS.get(operation.overloadpacket)
    return pointwise if handler is None and torch.Tag.pointwise in operation.tags else handler


def set_out(trace: Trace, call: Call, *axes: Axis) -> None:
    """Give an operation's only result its axes."""
    trace.set_axes(tensors_in(call.out)[0], axes)


def fix_others(trace: Trace, call: Call, kept: Sequence[int], axes: Axes, why: str) -> None:
    """Keep all dimensions whole but the named ones."""
    for dim, axis in enumerate(axes):
        if dim not in kept:
            fix(axis, f"{why} ({call.reason})")


def free_axis(size: int) -> Axis:
    """Return an axis that is tied to nothing yet."""
    return axis_of(Unit(size))


# Same shape ----------------------------------------------------------------------------------------------------------


def pointwise(trace: Trace, call: Call) -> None:
    """Broadcast arguments: dimensions that meet are tied, a dimension of size one adapts."""
    results = tensors_in(call.out)
    axes = join(trace, call, call.tensors(), results[0].shape)
    for result in results:
        trace.set_axes(result, axes)


def join(trace: Trace, call: Call, tensors: Sequence[torch.Tensor], shape: Sequence[int]) -> Axes:
    joined: list[Axis | None] = [None] * len(shape)
    for tensor in tensors:
        offset = len(shape) - tensor.ndim
        for dim, axis in enumerate(trace.axes(tensor)):
            if tensor.shape[dim] == 1 and shape[offset + dim] != 1:
                continue
            present = joined[offset + dim]
            if present is None:
                joined[offset + dim] = axis
            else:
                tie(present, axis, f"meets something whole in {call.reason}")
    return tuple(fixed(size) if axis is None else axis for axis, size in zip(joined, shape, strict=True))


handles("clone", "detach", "alias", "lift_fresh", "_to_copy", "contiguous", "as_strided_", "flip", "roll")(pointwise)
handles("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like", "fill_", "zero_")(pointwise)
handles("bernoulli_", "bernoulli", "native_dropout", "uniform_", "normal_", "new_empty_strided", "where")(pointwise)
handles("hardswish", "hardswish_", "mish_", "masked_fill", "masked_fill_", "log_sigmoid_forward")(pointwise)


@handles("copy_")
def copy(trace: Trace, call: Call) -> None:
    target, source = call.args[:2]
    set_out(trace, call, *join(trace, call, [target, source], target.shape))


@handles("empty", "zeros", "ones", "full", "arange", "rand", "randn", "scalar_tensor", "linspace", "eye")
def factory(trace: Trace, call: Call) -> None:
    """Keep channels whole that meet a tensor made from numbers."""
    trace.set_whole(call.out, f"a constant of {call.reason}")


handles("new_empty", "new_zeros", "new_ones", "new_full")(factory)


# Other shape, same positions -----------------------------------------------------------------------------------------


@handles("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(trace: Trace, call: Call) -> None:
    source = call.args[0]
    axes, shape = list(trace.axes(source)), list(call.out.shape)
    viewed = regroup(axes, list(source.shape), shape, f"viewed in another shape by {call.reason}")
    trace.bind_sizes(call, viewed)
    set_out(trace, call, *viewed)


def regroup(axes: list[Axis], shape: list[int], new_shape: list[int], reason: str) -> list[Axis]:
    """Return the axes after a view: runs of dimensions of equal size are flattened together and unflattened anew."""
    result: list[Axis] = []
    taken = 0
    start = 0
    while start < len(new_shape):
        old, new = [], []
        old_size = new_size = 1
        while True:
            if old_size <= new_size and taken < len(shape) and (old_size < new_size or not old):
                old.append(axes[taken])
                old_size *= shape[taken]
                taken += 1
            elif start + len(new) < len(new_shape) and (new_size < old_size or not new):
                new.append(new_shape[start + len(new)])
                new_size *= new[-1]
            else:
                break
        start += len(new)
        if len(old) == len(new) == 1:
            result.append(old[0])
        else:
            result.extend(unflatten(product(old), new, reason))
    return result


@handles("permute")
def permute(trace: Trace, call: Call) -> None:
    axes = trace.axes(call.args[0])
    set_out(trace, call, *(axes[dim] for dim in call.args[1]))


@handles("transpose", "t", "transpose_")
def transpose(trace: Trace, call: Call) -> None:
    axes = list(trace.axes(call.args[0]))
    if axes:
        first, second = call.args[1:3] if len(call.args) > 1 else (0, len(axes) - 1)
        axes[first], axes[second] = axes[second], axes[first]
    set_out(trace, call, *axes)


@handles("unsqueeze", "unsqueeze_")
def unsqueeze(trace: Trace, call: Call) -> None:
    axes = list(trace.axes(call.args[0]))
    axes.insert(call.args[1] % (len(axes) + 1), fixed(1))
    set_out(trace, call, *axes)


@handles("squeeze", "squeeze_")
def squeeze(trace: Trace, call: Call) -> None:
    source = call.args[0]
    dims = call.args[1] if len(call.args) > 1 else range(source.ndim)
    dims = [dims] if isinstance(dims, int) else dims
    gone = {dim % source.ndim for dim in dims if source.shape[dim] == 1}
    set_out(trace, call, *(axis for dim, axis in enumerate(trace.axes(source)) if dim not in gone))


@handles("expand", "repeat")
def expand(trace: Trace, call: Call) -> None:
    source = call.args[0]
    axes = [*[fixed(1)] * (call.out.ndim - source.ndim), *trace.axes(source)]
    for dim, (axis, size) in enumerate(zip(axes, call.out.shape, strict=True)):
        if axis_size(axis) != size:
            axes[dim] = product([fixed(size // axis_size(axis), f"by {call.reason}"), axis])
    set_out(trace, call, *axes)


# Pieces of a dimension -----------------------------------------------------------------------------------------------


@handles("cat")
def cat(trace: Trace, call: Call) -> None:
    tensors = [tensor for tensor in call.args[0] if tensor.ndim == call.out.ndim]
    dim = call.arg(1, "dim", 0) % call.out.ndim
    each = [trace.axes(tensor) for tensor in tensors]
    for axes in each[1:]:
        for other in set(range(call.out.ndim)) - {dim}:
            tie(each[0][other], axes[other], f"meets something whole in {call.reason}")
    set_out(trace, call, *each[0][:dim], concat([axes[dim] for axes in each]), *each[0][dim + 1 :])


@handles("stack")
def stack(trace: Trace, call: Call) -> None:
    tensors = call.args[0]
    axes = list(join(trace, call, tensors, tensors[0].shape))
    axes.insert(call.arg(1, "dim", 0) % call.out.ndim, fixed(len(tensors)))
    set_out(trace, call, *axes)


@handles("select", "unbind")
def select(trace: Trace, call: Call) -> None:
    """Take one position, or every single one, of a dimension."""
    source = call.args[0]
    dim = call.arg(1, "dim", 0) % source.ndim
    axes = trace.axes(source)
    fix(axes[dim], f"single positions are taken by {call.reason}")
    for piece in tensors_in(call.out):
        trace.set_axes(piece, (*axes[:dim], *axes[dim + 1 :]))


@handles("slice")
def take_slice(trace: Trace, call: Call) -> None:
    source = call.args[0]
    dim = call.arg(1, "dim", 0) % source.ndim
    size, kept = source.shape[dim], call.out.shape[dim]
    start = call.arg(2, "start") or 0
    start = max(0, start + size) if start < 0 else min(start, size)
    axes = list(trace.axes(source))
    if call.arg(4, "step", 1) != 1 and kept != size:
        fix(axes[dim], f"every n-th position is taken by {call.reason}")
        axes[dim] = fixed(kept)
    elif kept != size:
        sizes = [start, kept, size - start - kept]
        pieces = split(axes[dim], [n for n in sizes if n], f"cut by {call.reason}")
        trace.bind_sizes(call, [*pieces, axes[dim]])
        axes[dim] = pieces[1 if start else 0] if kept else fixed(0)
    set_out(trace, call, *axes)


@handles("split", "split_with_sizes", "chunk")
def take_pieces(trace: Trace, call: Call) -> None:
    source = call.args[0]
    dim = call.arg(2, "dim", 0) % source.ndim
    axes = trace.axes(source)
    pieces = split(axes[dim], [piece.shape[dim] for piece in call.out], f"cut by {call.reason}")
    trace.bind_sizes(call, pieces)
    trace.bind_sizes(call, [axes[dim]])
    for tensor, piece in zip(call.out, pieces, strict=True):
        trace.set_axes(tensor, (*axes[:dim], piece, *axes[dim + 1 :]))


@handles("index")
def index(trace: Trace, call: Call) -> None:
    """Look up positions: the dimensions that are looked up stay whole, the others pass through."""
    source, indices = call.args
    axes = trace.axes(source)
    looked_up = [dim for dim, idx in enumerate(indices) if idx is not None]
    fix_others(trace, call, [dim for dim in range(source.ndim) if dim not in looked_up], axes, "looked up")
    consecutive = looked_up == list(range(looked_up[0], looked_up[-1] + 1))
    rest = [axis for dim, axis in enumerate(axes) if dim not in looked_up]
    new = [fixed(size) for size in torch.broadcast_shapes(*(indices[dim].shape for dim in looked_up))]
    at = looked_up[0] if consecutive else 0
    set_out(trace, call, *rest[:at], *new, *rest[at:])


@handles("constant_pad_nd")
def pad(trace: Trace, call: Call) -> None:
    """Pad space, or channels with zeros at the end, as many as the model computes from their number."""
    source, amounts = call.args[:2]
    axes = list(trace.axes(source))
    for dim, axis in enumerate(axes):
        place = 2 * (source.ndim - 1 - dim)
        before, after = amounts[place : place + 2] if place < len(amounts) else (0, 0)
        if not (before or after):
            continue
        if before:
            fix(axis, f"padded in front by {call.reason}")
        elif call.arg(2, "value", 0):
            fix(axis, f"padded with a number by {call.reason}")
        elif sum(map(len, axis)) > 1:
            fix(axis, f"padded behind several pieces by {call.reason}")
        axes[dim] = free_axis(call.out.shape[dim]) if free_units([axis]) else fixed(call.out.shape[dim])
    set_out(trace, call, *axes)


# Reductions and space ------------------------------------------------------------------------------------------------


# Norms written out in Python, whose statistics are taken over the kept channels like those of a layer norm.
NORMS_OVER_CHANNELS = (
    nn.RMSNorm,
    *(layers.RmsNorm, layers.RmsNorm2d, layers.RmsNormFp32, layers.RmsNorm2dFp32),
    *(layers.SimpleNorm, layers.SimpleNorm2d, layers.SimpleNormFp32, layers.SimpleNorm2dFp32),
)


@handles("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "linalg_vector_norm", "argmax")
def reduce(trace: Trace, call: Call) -> None:
    """Reduce over batch and space; a reduction over channels would change with their number."""
    source = call.args[0]
    position, name = (2, "dim") if call.name == "linalg_vector_norm" else (1, "dim")
    dims = call.arg(position, name)
    dims = list(range(source.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % source.ndim for dim in dims} if source.ndim else set()
    axes = trace.axes(source)
    if not isinstance(call.module, NORMS_OVER_CHANNELS):
        fix_others(trace, call, [dim for dim in range(source.ndim) if dim not in gone], axes, "reduced over channels")
    for result in tensors_in(call.out):
        keepdim = result.ndim == source.ndim
        kept = [fixed(1) if dim in gone else axis for dim, axis in enumerate(axes) if keepdim or dim not in gone]
        trace.set_axes(result, tuple(kept))


@handles("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "softmax", "log_softmax", "sort", "topk")
def along(trace: Trace, call: Call) -> None:
    """Keep the one dimension whole along which an operation goes."""
    source = call.args[0]
    dim = call.arg(2 if call.name == "topk" else 1, "dim", -1) % source.ndim
    fix(trace.axes(source)[dim], f"normalised or sorted over channels ({call.reason})")
    for result in tensors_in(call.out):
        axes = list(trace.axes(source))
        if result.shape[dim] != source.shape[dim]:
            axes[dim] = fixed(result.shape[dim])
        trace.set_axes(result, tuple(axes))


@handles("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d_with_indices")
@handles("_adaptive_avg_pool2d", "adaptive_max_pool2d", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
@handles("upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d")
@handles("_upsample_bicubic2d_aa", "upsample_nearest1d", "upsample_nearest2d", "_upsample_nearest_exact2d")
def spatial(trace: Trace, call: Call) -> None:
    """Pool, resize or pad the last dimensions, as many as the operation's name says."""
    axes = trace.axes(call.args[0])
    space = 1 if "1d" in call.name else 2
    fix_others(trace, call, range(len(axes) - space), axes, "pooled or resized over channels")
    for result in tensors_in(call.out):
        trace.set_axes(result, (*axes[:-space], *(fixed(size) for size in result.shape[-space:])))


@handles("im2col")
def unfold(trace: Trace, call: Call) -> None:
    """Make columns of windows: each channel becomes the positions of the window."""
    axes = trace.axes(call.args[0])
    fix_others(trace, call, (0, 1), axes, "unfolded")
    positions = fixed(call.out.shape[1] // axis_size(axes[1]))
    set_out(trace, call, axes[0], product([axes[1], positions]), fixed(call.out.shape[2]))


@handles("col2im")
def fold(trace: Trace, call: Call) -> None:
    axes = trace.axes(call.args[0])
    channels = call.out.shape[1]
    inner = unflatten(axes[1], [channels, axis_size(axes[1]) // channels], f"folded by {call.reason}")
    fix(inner[1], f"folded by {call.reason}")
    set_out(trace, call, axes[0], inner[0], *(fixed(size) for size in call.out.shape[2:]))
