"""The largest errors of slimmed convolutions and networks relative to float64, for each shape or width."""

import copy
import itertools
import multiprocessing
from collections.abc import Callable

import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

import gradaug_hf
from gradaug_hf.slimming.patching import Slices, WidthState, patch
from gradaug_hf.slimming.patterns import Kept, Whole, Width

CHANNELS = 34
NETWORKS = {"resnet18": (0.05, 0.2), "wrn16_2": (0.1, 0.4), "regnety_002": (0.125, 0.5), "convnext_atto": (0.1, 0.3)}
STANDARDISED_OR_SAME = (Conv2dSame, StdConv2d, ScaledStdConv2d)
ELSEWHERE = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
# Kind, kernels, strides, paddings and groups of the convolutions that one process tries.
CONVOLUTIONS = [
    (nn.Conv2d, (1,), (1, 2, 3), (0, 1), (1, 2)),
    (nn.Conv2d, (3,), (1, 2, 3), (1,), (1, 2)),
    *((kind, (1, 3), (2,), (0,), (1,)) for kind in (*STANDARDISED_OR_SAME, *ELSEWHERE)),
]


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """Return a copy whose channels lie innermost, or plainly contiguous."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def convolution_errors(kind: type[nn.Module], *choices: tuple[int, ...]) -> dict[str, float]:
    """Return the error of value and gradients with 3 to 17 input channels in every group."""
    errors = {}
    for kept, last, kernel, stride, padding, groups in itertools.product(range(3, 18), (True, False), *choices):
        name = f"{kept=} {last=} {kernel=} {stride=} {padding=} {groups=}"
        errors[name] = convolution_error(kind, kept, last, kernel, stride, padding, groups)
    return errors


def convolution_error(
    kind: type[nn.Module], kept: int, channels_last: bool, kernel: int, stride: int, padding: int, groups: int
) -> float:
    torch.manual_seed(kept)
    conv = kind(CHANNELS * groups, 12 * groups, kernel, stride, padding, groups=groups, bias=True)
    dim = 0 if getattr(conv, "transposed", False) else 1
    conv.weight.data = in_format(conv.weight.data, channels_last)
    narrow = copy.deepcopy(conv).double()
    narrow.weight = nn.Parameter(narrow.weight.detach().narrow(dim, 0, kept).contiguous())
    narrow.in_channels = kept * groups
    patterns = [(Whole(size),) for size in conv.weight.shape]
    patterns[dim] = (Kept(1, CHANNELS, 1),)
    slices = Slices({"weight": tuple(patterns)}, {"in_channels": ((Kept(groups, CHANNELS, 1),),)})
    patch(conv, {"": slices}, {}, WidthState(Width(kept / CHANNELS)))
    space = [8 if kind is nn.Conv3d else 18] * (conv.weight.ndim - 2)
    x = in_format(torch.randn(4, kept * groups, *space), channels_last).requires_grad_()
    x64 = x.detach().double().contiguous().requires_grad_()
    out, expected = conv(x), narrow(x64)
    cotangent = in_format(torch.randn(out.shape), channels_last)
    out.backward(cotangent)
    expected.backward(cotangent.double())
    weight_gradient = conv._parameters["weight"].grad.narrow(dim, 0, kept)
    pairs = [(out, expected), (x.grad, x64.grad), (weight_gradient, narrow.weight.grad)]
    pairs.append((conv.bias.grad, narrow.bias.grad))
    return max(relative_error(a.detach(), b.detach()) for a, b in pairs)


def network_errors(name: str) -> dict[str, float]:
    """Return the error of the gradients of all parameters together at each width."""
    errors = {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
    for module in list(model.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, nn.ReLU):  # of which a rounding error next to zero turns the gradient
                setattr(module, child, nn.SiLU())
    gradaug_hf.make_slimmable(model, input_size=64)
    model64 = copy.deepcopy(model).double().to(memory_format=torch.contiguous_format)
    images = torch.randn(4, 3, 64, 64)
    for width in NETWORKS[name]:
        gradients = []
        for network, x in ((model, images.contiguous(memory_format=torch.channels_last)), (model64, images.double())):
            with gradaug_hf.at_width(network, width):
                loss = network(x).square().sum()
                found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
        errors[width] = relative_error(*gradients)
    return errors


def in_child(function: Callable, *args: object) -> dict[str, float] | str:
    """Return what a function returns in a forked process, or how the process ended."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def send() -> None:
        torch.set_num_threads(1)
        sender.send(function(*args))

    child = context.Process(target=send)
    child.start()
    sender.close()
    answer = None
    try:
        if receiver.poll(120):
            answer = receiver.recv()
    except EOFError:
        pass
    if answer is None:
        child.kill()
    child.join()
    return answer if child.exitcode == 0 else f"ended with {child.exitcode}"
