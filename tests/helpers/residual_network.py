"""A small residual network, and the same network narrowed and shortened by hand: tensors, slices and formulas only."""

from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

STEM, WIDE, CLASSES = 8, 12, 5


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(in_channels, out_channels, 1, stride)
        self.drop_path = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return self.act(self.drop_path(self.bn2(self.conv2(y))) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """Stem, a block of 8 channels, two of 12 at half the size, pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 3, 1, 1)
        self.bn = nn.BatchNorm2d(STEM)
        self.block1 = ResidualBlock(STEM, STEM, 1)
        self.block2 = ResidualBlock(STEM, WIDE, 2)
        self.block3 = ResidualBlock(WIDE, WIDE, 1)
        self.fc = nn.Linear(WIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x)))
        return self.fc(self.block3(self.block2(self.block1(x))).mean(dim=(2, 3)))


def make_network(seed: int = 0, dtype: torch.dtype = torch.float64) -> ResidualNetwork:
    """A network with random weights, gains and offsets."""
    generator = torch.Generator().manual_seed(seed)
    network = ResidualNetwork().to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return network


def narrow_forward(p: dict[str, Tensor], images: Tensor, width: float, dropped: Collection[str] = ()) -> Tensor:
    """Logits of the network that keeps its first channels and not its dropped blocks, in training mode."""
    few, many = int(STEM * width + 0.5), int(WIDE * width + 0.5)

    def norm(x: Tensor, name: str, kept: int) -> Tensor:
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        gain, offset = (p[f"{name}.{kind}"][:kept].view(1, -1, 1, 1) for kind in ("weight", "bias"))
        return (x - mean) / torch.sqrt(variance + 1e-5) * gain + offset

    def block(x: Tensor, name: str, kept_in: int, kept: int, stride: int) -> Tensor:
        shortcut = x
        if stride != 1:
            weight, bias = p[f"{name}.shortcut.weight"][:kept, :kept_in], p[f"{name}.shortcut.bias"][:kept]
            shortcut = functional.conv2d(x, weight, bias, stride)
        if name in dropped:
            return shortcut.clamp(min=0)
        y = functional.conv2d(x, p[f"{name}.conv1.weight"][:kept, :kept_in], None, stride, 1)
        y = norm(y, f"{name}.bn1", kept).clamp(min=0)
        y = norm(functional.conv2d(y, p[f"{name}.conv2.weight"][:kept, :kept], None, 1, 1), f"{name}.bn2", kept)
        return (y + shortcut).clamp(min=0)

    x = functional.conv2d(images, p["stem.weight"][:few], p["stem.bias"][:few], 1, 1)
    x = norm(x, "bn", few).clamp(min=0)
    x = block(block(x, "block1", few, few, 1), "block2", few, many, 2)
    x = block(x, "block3", many, many, 1)
    return x.mean(dim=(2, 3)) @ p["fc.weight"][:, :many].T + p["fc.bias"]


def resize_by_hand(images: Tensor, side: int) -> Tensor:
    """Bilinear interpolation between pixels whose corners are aligned, as a matrix product along each side."""
    old = images.shape[-1]
    matrix = torch.zeros(side, old, dtype=images.dtype)
    for i in range(side):
        position = i * (old - 1) / (side - 1)
        low = min(int(position), old - 2)
        matrix[i, low], matrix[i, low + 1] = 1 - (position - low), position - low
    return matrix @ images @ matrix.T


def objective_by_hand(
    p: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    subnets: list[tuple],
    parts: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and the sum of the divergences, for labels or probabilities.

    A sub-network is (width, side, names of dropped blocks...), and sees the images of its part, or all.
    """
    log_p = _log_softmax(narrow_forward(p, images, 1.0))
    target = functional.one_hot(labels, CLASSES).to(images.dtype) if labels.ndim == 1 else labels
    cross_entropy = -(target * log_p).sum() / len(images)
    log_target = log_p.detach()
    divergence = torch.zeros((), dtype=images.dtype)
    parts = parts or [list(range(len(images)))] * len(subnets)
    for (width, side, *dropped), seen in zip(subnets, parts, strict=True):
        log_q = _log_softmax(narrow_forward(p, resize_by_hand(images[seen], side), width, dropped))
        divergence = divergence + (log_target[seen].exp() * (log_target[seen] - log_q)).sum() / len(seen)
    return cross_entropy, divergence


def _log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def gradients_by_hand(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    subnets: list[tuple],
    kl_weight: float = 1.0,
    parts: Sequence[Sequence[int]] | None = None,
) -> tuple[float, OrderedDict[str, Tensor]]:
    """The objective and its gradients, from copies of the network's parameters."""
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in network.named_parameters()}
    cross_entropy, divergence = objective_by_hand(p, images, labels, subnets, parts)
    loss = cross_entropy + kl_weight * divergence
    gradients = torch.autograd.grad(loss, list(p.values()))
    return loss.item(), OrderedDict(zip(p, gradients, strict=True))
