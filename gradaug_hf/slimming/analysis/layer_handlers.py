"""Derive the axes of the results of layers: convolutions, norms, products of matrices, recurrence and attention."""

from typing import Any

import torch
from torch import nn

from gradaug_hf.slimming.analysis.axes import Axis, axis_size, fix, fixed, product, tie, unflatten
from gradaug_hf.slimming.analysis.handlers import fix_others, free_axis, handles, join, set_out
from gradaug_hf.slimming.analysis.tracing import Axes, Call, Product, Trace, refuse, register_layer, tensors_in


@handles("convolution")
def convolution(trace: Trace, call: Call) -> None:
    source, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    if transposed and groups > 1:
        return refuse(trace, call, "a transposed convolution with groups is not followed")
    axes, weight_axes = trace.axes(source), trace.axes(weight)
    fix_others(trace, call, (0, 1), axes, "convolved over")
    fix_others(trace, call, (0, 1), weight_axes, "")
    if transposed:
        weight_axes = (weight_axes[1], weight_axes[0], *weight_axes[2:])
    if groups == 1:
        tie(axes[1], weight_axes[1], call.reason)
    else:
        _tie_groups(trace, call, axes[1], weight_axes, groups)
    if bias is not None:
        tie(trace.axes(bias)[0], weight_axes[0], call.reason)
    trace.bind(call.module, "in_channels", axes[1])
    trace.bind(call.module, "out_channels", weight_axes[0])
    set_out(trace, call, axes[0], weight_axes[0], *(fixed(size) for size in call.out.shape[2:]))
    space = source.shape[2:] if transposed else call.out.shape[2:]
    sizes = [fixed(size) for size in (*space, *weight.shape[2:])]
    trace.products.append(Product(call.module_name, [axes[0], weight_axes[0], weight_axes[1], *sizes]))


def _tie_groups(trace: Trace, call: Call, channels: Axis, weight_axes: Axes, groups: int) -> None:
    """Tie a depthwise convolution's outputs to its inputs; keep the same positions in every group of another one."""
    out_size, group_size = axis_size(weight_axes[0]), axis_size(weight_axes[1])
    if group_size == 1:
        multiplier = fixed(out_size // groups, "channels that share an input of a depthwise convolution")
        tie(weight_axes[0], product([channels, multiplier]), call.reason)
        trace.bind(call.module, "groups", channels)
        return
    whole = fixed(groups, "groups of a convolution")
    tie(channels, product([whole, weight_axes[1]]), call.reason)
    tie(weight_axes[0], product([whole, free_axis(out_size // groups)]), call.reason)


@handles("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
def batch_norm(trace: Trace, call: Call) -> None:
    axes = trace.axes(call.args[0])
    for tensor in call.args[1:5]:
        if isinstance(tensor, torch.Tensor):
            tie(axes[1], trace.axes(tensor)[0], call.reason)
    trace.bind(call.module, "num_features", axes[1])
    result, *statistics = tensors_in(call.out)
    trace.set_axes(result, axes)
    for statistic in statistics:
        trace.set_axes(statistic, (axes[1],) if statistic.numel() else (fixed(0),))


@handles("_weight_norm_interface")
def weight_norm(trace: Trace, call: Call) -> None:
    """Slice the dimension of a weight that its norm is not taken over; keep the others whole."""
    weight, gain = call.args[:2]
    dim = call.arg(2, "dim", 0) % weight.ndim
    axes = trace.axes(weight)
    fix_others(trace, call, (dim,), axes, "its norm is taken")
    tie(axes[dim], trace.axes(gain)[dim], call.reason)
    for result in tensors_in(call.out):
        sizes = zip(axes, result.shape, strict=True)
        trace.set_axes(result, tuple(axis if axis_size(axis) == size else fixed(size) for axis, size in sizes))


@handles("embedding")
def embedding(trace: Trace, call: Call) -> None:
    """Look up rows of a table, which stay; the channels in them pass through."""
    weight, indices = call.args[:2]
    rows, channels = trace.axes(weight)
    fix(rows, f"rows that are looked up by {call.reason}")
    trace.bind(call.module, "embedding_dim", channels)
    set_out(trace, call, *trace.axes(indices), channels)


@handles("native_layer_norm", "_fused_rms_norm")
def layer_norm(trace: Trace, call: Call) -> None:
    """Take layer and RMS norms over the kept channels."""
    source, shape = call.args[:2]
    axes = trace.axes(source)
    for tensor in call.args[2:4]:
        if isinstance(tensor, torch.Tensor):
            for axis, other in zip(axes[-len(shape) :], trace.axes(tensor), strict=True):
                tie(axis, other, call.reason)
    trace.bind(call.module, "normalized_shape", *axes[-len(shape) :])
    result, *statistics = tensors_in(call.out)
    trace.set_axes(result, axes)
    for statistic in statistics:
        trace.set_axes(statistic, (*axes[: -len(shape)], *[fixed(1)] * len(shape))[: statistic.ndim])


@handles("native_group_norm")
def group_norm(trace: Trace, call: Call) -> None:
    """Keep the same positions in every group, or with one channel a group the first groups."""
    source, weight, bias = call.args[:3]
    groups = call.args[6]
    axes = trace.axes(source)
    size = source.shape[1] // groups
    if size > 1:
        tie(axes[1], product([fixed(groups, "groups of a norm"), free_axis(size)]), call.reason)
    else:
        trace.bind(call.module, "num_groups", axes[1])
    for tensor in (weight, bias):
        if tensor is not None:
            tie(axes[1], trace.axes(tensor)[0], call.reason)
    trace.bind(call.module, "num_channels", axes[1])
    result, *statistics = tensors_in(call.out)
    trace.set_axes(result, axes)
    for statistic in statistics:
        trace.set_axes(statistic, (axes[0], axes[1] if size == 1 else fixed(groups)))


@handles("mm", "addmm", "bmm", "baddbmm")
def matrix_product(trace: Trace, call: Call) -> None:
    added, (left, right) = call.args[:-2], call.args[-2:]
    left_axes, right_axes = trace.axes(left), trace.axes(right)
    for a, b in zip(left_axes[:-2], right_axes[:-2], strict=True):
        tie(a, b, call.reason)
    tie(left_axes[-1], right_axes[-2], call.reason)
    axes = (*left_axes[:-1], right_axes[-1])
    trace.set_axes(call.out, axes)
    for tensor in added:
        join(trace, call, [call.out, tensor], call.out.shape)
    trace.bind(call.module, "in_features", left_axes[-1])
    trace.bind(call.module, "out_features", right_axes[-1])
    trace.products.append(Product(call.module_name, [*axes, left_axes[-1]]))


@register_layer(nn.RNNBase)
def recurrent(trace: Trace, layer: nn.RNNBase, *inputs_and_output: Any) -> None:
    """Keep LSTMs and their kin whole: their kernels take a list of weights that is made when they are built."""
    reason = "a recurrent layer"
    sequences, out = inputs_and_output[0], inputs_and_output[-1][0]
    weights = list(layer.parameters())
    trace.keep_whole([sequences, *weights], reason)
    trace.set_whole(inputs_and_output[-1], reason)
    steps = fixed(out.numel() // out.shape[-1])
    for matrix in (weight for weight in weights if weight.ndim == 2):
        trace.products.append(Product(trace.name_of(layer), [steps, *trace.axes(matrix)]))


@register_layer(nn.MultiheadAttention)
def multihead_attention(trace: Trace, layer: nn.MultiheadAttention, *inputs_and_output: Any) -> None:
    """Slice whole heads, also of what goes in and comes out: the forward takes their number from that size."""
    sources, (out, *weights) = inputs_and_output[:3], inputs_and_output[-1]
    reason = "an attention with keys or values of another size"
    channels = trace.axes(sources[0])[-1]
    heads, positions = unflatten(channels, [layer.num_heads, layer.head_dim], "heads of an attention")
    fix(positions, "positions of a head")
    if not layer._qkv_same_embed_dim:
        fix(channels, reason)
    for axis in (axis for tensor in (*sources, *layer.parameters()) for axis in trace.axes(tensor)):
        if axis_size(axis) == layer.embed_dim:
            tie(axis, channels, "meets something whole in an attention")
        elif axis_size(axis) == 3 * layer.embed_dim:  # query, key and value behind each other
            tie(axis, product([fixed(3), channels]), "meets something whole in an attention")
        else:
            fix(axis, reason)
    for name in ("embed_dim", "kdim", "vdim"):
        trace.bind(layer, name, channels)
    trace.bind(layer, "num_heads", heads)
    for name in ("in_features", "out_features"):
        trace.bind(layer.out_proj, name, channels)
    queries, keys = trace.axes(sources[0])[:-1], trace.axes(sources[1])[-2 if layer.batch_first else 0]
    trace.set_axes(out, (*queries, channels))
    trace.set_whole(weights, "weights of an attention")
    for source in (*sources, sources[0]):  # the fourth projection is that of the output
        trace.products.append(Product(trace.name_of(layer), [*trace.axes(source)[:-1], channels, channels]))
    trace.products.extend([Product(trace.name_of(layer), [*queries, keys, channels])] * 2)
