"""Time of a GradAug step of random depth: dropped blocks left out, beside blocks computed and multiplied by zero.

    python benchmarks/depth.py
    python benchmarks/depth.py --network resnet110_cifar:32:128 --steps 20 --device cuda

The steps of all methods take turns in one process, so that whatever else the machine does falls on all alike. All
sub-networks see the images at full size; the share of the block passes that is dropped is that of the sampled steps.
"""

import argparse
import copy
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import timm
import torch
from torch import Tensor, nn

import gradaug_hf
from gradaug_hf.objective.losses import cross_entropy, soft_target_divergence
from gradaug_hf.slimming.depth import find_shortcuts

SURVIVALS = (0.8, 0.5)
PLAIN, ZEROED, DROPPED = "plain", "GradAug, blocks times zero", "GradAug, blocks left out"


@dataclass
class Method:
    """A way of taking one training step, and how long it took."""

    name: str
    step: Callable[[int], object]
    survival: float = 1.0
    seconds: list[float] = field(default_factory=list)


class Gate(nn.Module):
    """A drop path that keeps all of a batch, or multiplies it by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.keeps = True

    def forward(self, x: Tensor) -> Tensor:
        return x if self.keeps else x * 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet110_cifar:32:32", help="name:side in pixels:batch size")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each method")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    name, side, batch = args.network.split(":")
    device = torch.device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, {args.steps} steps each")
    print(f"{name} at {side} pixels, batch size {batch}, 3 sub-networks\n")
    torch.manual_seed(0)
    model = timm.create_model(name).to(device)
    images = torch.randn(int(batch), 3, int(side), int(side), device=device)
    labels = torch.randint(0, model.num_classes, (len(images),), device=device)
    methods = [plain(model, images, labels)]
    for survival in SURVIVALS:
        methods += [zeroed(model, images, labels, survival), dropped(model, images, labels, survival)]
    for step in range(-1, args.steps):
        for method in methods:
            start = time.perf_counter()
            method.step(max(step, 0))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step >= 0:
                method.seconds.append(time.perf_counter() - start)
    print_table(methods, len(find_shortcuts(model)[0]))


def plain(model: nn.Module, images: Tensor, labels: Tensor) -> Method:
    model = copy.deepcopy(model)
    return Method(PLAIN, stepping(model, lambda _: nn.functional.cross_entropy(model(images), labels).backward()))


def dropped(model: nn.Module, images: Tensor, labels: Tensor, survival: float) -> Method:
    """GradAug as it is."""
    model = copy.deepcopy(model)
    gradaug = gradaug_hf.GradAug(model, subnet_mode="depth", min_survival=survival, resolutions=[images.shape[-1]])
    return Method(DROPPED, stepping(model, partial(gradaug.backward, images, labels)), survival)


def zeroed(model: nn.Module, images: Tensor, labels: Tensor, survival: float) -> Method:
    """The same sub-networks, by drop paths that give zeros."""
    model = copy.deepcopy(model)
    gates = [Gate() for _ in find_shortcuts(model)[0]]
    for name, gate in zip(find_shortcuts(model)[0], gates, strict=True):
        model.get_submodule(name).drop_path = gate
    sampler = gradaug_hf.SubnetSampler(subnet_mode="depth", min_survival=survival)

    def backward(step: int) -> None:
        logits = model(images)
        cross_entropy(logits, labels).backward()
        for subnet in sampler.sample(step):
            for index in subnet.dropped_blocks(len(gates)):
                gates[index].keeps = False
            soft_target_divergence(model(images), logits).backward()
            for gate in gates:
                gate.keeps = True

    return Method(ZEROED, stepping(model, backward), survival)


def stepping(model: nn.Module, backward: Callable[[int], object]) -> Callable[[int], None]:
    """A training step around what adds the gradients."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)

    def step(number: int) -> None:
        optimizer.zero_grad()
        backward(number)
        optimizer.step()

    return step


def print_table(methods: list[Method], num_blocks: int) -> None:
    print("| method | min_survival | blocks dropped, % | seconds | over plain | over blocks times zero |")
    print("|---|---|---|---|---|---|")
    means = {(method.name, method.survival): sum(method.seconds) / len(method.seconds) for method in methods}
    for method in methods:
        steps = range(len(method.seconds))
        sampler = gradaug_hf.SubnetSampler(subnet_mode="depth", min_survival=method.survival)
        counts = [len(subnet.dropped_blocks(num_blocks)) for step in steps for subnet in sampler.sample(step)]
        share = 100 * sum(counts) / len(counts) / num_blocks
        mean = means[method.name, method.survival]
        computed = means.get((ZEROED, method.survival), mean)
        print(
            f"| {method.name} | {method.survival} | {share:.0f} | {mean:.3f} | {mean / means[PLAIN, 1.0]:.2f} "
            f"| {mean / computed:.2f} |"
        )


if __name__ == "__main__":
    main()
