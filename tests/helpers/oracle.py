"""An independent check of slicing: the full network whose left-out channels are zeroed.

Shares no code with `gradaug_hf`. Which entries of a parameter a sub-network uses is read off its own parameters: every
entry of a copy is given a number, the sub-network is extracted, and the numbers that remain are looked up. The
untouched network with all other entries set to zero must then compute the same. Norms whose statistics run over
channels, and convolutions that standardise their weights, are restricted to the kept ones.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm import layers
from timm.layers import GroupNormAct, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

import gradaug_hf

Kept = dict[str, list[Tensor]]

ROOT_MEAN_SQUARE = (nn.RMSNorm, layers.RmsNorm, layers.RmsNorm2d, layers.RmsNormFp32, layers.RmsNorm2dFp32)
SIMPLE = (layers.SimpleNorm, layers.SimpleNorm2d, layers.SimpleNormFp32, layers.SimpleNorm2dFp32)


def kept_entries(model: nn.Module, width: float) -> Kept:
    """Parameter name -> for each dimension, the positions that the sub-network uses."""
    numbered = copy.deepcopy(model).double()
    full_shapes = {}
    with torch.no_grad():
        for name, parameter in numbered.named_parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape))
            full_shapes[name] = parameter.shape
    subnet = gradaug_hf.extract_subnet(numbered, width)
    return {name: _positions(part.detach(), full_shapes[name]) for name, part in subnet.named_parameters()}


def _positions(part: Tensor, shape: torch.Size) -> list[Tensor]:
    indices = torch.unravel_index(part.long(), shape)
    positions = [index.movedim(dim, 0).reshape(index.shape[dim], -1)[:, 0] for dim, index in enumerate(indices)]
    if positions:
        box = torch.stack(torch.meshgrid(*positions, indexing="ij"))
        assert torch.equal(box, torch.stack(indices)), "a sub-network takes a box of each parameter"
    return positions


def zeroed(untouched: nn.Module, kept: Kept) -> nn.Module:
    """A float64 copy of an untouched network with every left-out entry set to zero."""
    network = copy.deepcopy(untouched).double().eval()
    with torch.no_grad():
        for name, module in list(network.named_modules()):
            if isinstance(module, (StdConv2d, ScaledStdConv2d)) or type(module).__name__.endswith("StdConv2dSame"):
                _standardise_kept(module, kept[f"{name}.weight" if name else "weight"])
        for name, parameter in network.named_parameters():
            if name in kept:
                parameter.mul_(_mask(parameter, kept[name]))
    for name, module in network.named_modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.forward = _layer_norm(module, kept[f"{name}.weight"][0])
        elif isinstance(module, nn.LayerNorm):
            module.forward = _plain_layer_norm(module)
        elif isinstance(module, (*ROOT_MEAN_SQUARE, *SIMPLE)) and module.weight is not None:
            module.forward = _root_mean_square_norm(module, kept[f"{name}.weight"][0])
        elif isinstance(module, (nn.GroupNorm, GroupNormAct)):
            module.forward = _group_norm(module, kept[f"{name}.weight"][0])
    return network


def _mask(parameter: Tensor, positions: list[Tensor]) -> Tensor:
    mask = torch.zeros_like(parameter)
    mask[torch.meshgrid(*positions, indexing="ij") if positions else ...] = 1
    return mask


def _layer_norm(module: nn.Module, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """Normalise over the kept positions of the last dimension (of the second, for an image layout)."""
    channels_first = "2d" in type(module).__name__

    def forward(x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if channels_first else x
        part = x[..., kept]
        mean, var = part.mean(-1, keepdim=True), part.var(-1, unbiased=False, keepdim=True)
        y = (x - mean) / (var + module.eps).sqrt() * module.weight
        y = y if module.bias is None else y + module.bias
        y = y.movedim(-1, 1) if channels_first else y
        return module.act(module.drop(y)) if hasattr(module, "act") else y

    return forward


def _plain_layer_norm(module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """Without a gain that tells, the kept positions are those at which the zeroed network is not zero throughout."""

    def forward(x: Tensor) -> Tensor:
        kept = x.flatten(0, -2).any(0).nonzero().squeeze(1)
        part = x[..., kept]
        y = torch.zeros_like(x)
        y[..., kept] = (part - part.mean(-1, keepdim=True)) / (
            part.var(-1, unbiased=False, keepdim=True) + module.eps
        ).sqrt()
        return y

    return forward


def _root_mean_square_norm(module: nn.Module, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """Divide by the root mean square (by the deviation, in timm's simple norm) of the kept positions."""
    channels_first = "2d" in type(module).__name__
    centred = isinstance(module, SIMPLE)

    def forward(x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if channels_first else x
        part = x[..., kept]
        square = part.var(-1, keepdim=True) if centred else part.square().mean(-1, keepdim=True)
        y = x / (square + module.eps).sqrt() * module.weight
        y = y.movedim(-1, 1) if channels_first else y
        return module.act(module.drop(y)) if hasattr(module, "act") else y

    return forward


def _group_norm(module: nn.Module, kept: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        in_group = x.shape[1] // module.num_groups
        y = torch.zeros_like(x)
        for group in range(module.num_groups):
            members = kept[kept // in_group == group]
            if len(members):
                part = x[:, members]
                dims = tuple(range(1, part.ndim))
                mean, var = part.mean(dims, keepdim=True), part.var(dims, unbiased=False, keepdim=True)
                y[:, members] = (part - mean) / (var + module.eps).sqrt()
        shape = (1, -1) + (1,) * (x.ndim - 2)
        y = y * module.weight.view(shape) + (0 if module.bias is None else module.bias.view(shape))
        if isinstance(module, GroupNormAct):
            y = module.act(module.drop(y))
        return y

    return forward


def _standardise_kept(module: nn.Module, positions: list[Tensor]) -> None:
    """Store the standardised kept weights and let the module convolve with them as they are."""
    outs, ins = positions[:2]
    part = module.weight[outs][:, ins]
    var, mean = torch.var_mean(part, dim=(1, 2, 3), unbiased=False, keepdim=True)
    part = (part - mean) / (var + module.eps).sqrt()
    if hasattr(module, "gain"):
        part = part * module.gain[outs] * module.scale
    weight = torch.zeros_like(module.weight)
    weight[outs[:, None], ins] = part
    same = "Same" in type(module).__name__

    def forward(x: Tensor) -> Tensor:
        x = _pad_same(x, module) if same else x
        padding = 0 if same else module.padding
        return F.conv2d(x, weight, module.bias, module.stride, padding, module.dilation, module.groups)

    module.forward = forward


def _pad_same(x: Tensor, module: nn.Module) -> Tensor:
    """TensorFlow's padding: as many pixels as the strides need, the odd one behind."""
    amounts = []
    for side, kernel, stride in zip(x.shape[-2:], module.kernel_size, module.stride, strict=True):
        need = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        amounts = [need // 2, need - need // 2, *amounts]
    return F.pad(x, amounts)


def randomised(model: nn.Module, images: Tensor) -> nn.Module:
    """The network in eval mode, with gains, layer scales and statistics that hide nothing (no zeros, no ones)."""
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim <= 1 or not parameter.abs().sum():
                low, high = (-0.3, 0.3) if name.endswith("bias") else (0.5, 1.5)
                parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))
        if norms:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0
            model.train()(images)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model.eval()


def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).norm() / expected.norm())
