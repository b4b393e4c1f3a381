"""Time and peak memory of a GradAug step beside those of a plain step, with the arithmetic bound.

    python benchmarks/step.py
    python benchmarks/step.py --networks resnet50:224:64 --steps 20 --device cuda

The steps of all methods take turns in one process, so that whatever else the machine does falls on all alike. The
bound is the multiply-adds of the drawn sub-networks over those of the full network, width squared times side squared
as the paper counts them (arXiv 2006.07989), plus one for the full network. "dense" runs the same sub-networks as
ordinary narrow networks (`extract_subnet`, not timed) in place of slices: what is beyond its time is the slicing's.
"""

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gradaug_hf
from gradaug_hf.losses import soft_target_divergence
from gradaug_hf.transforms import resize

MIN_WIDTH = {"resnet50": 0.9, "wrn28_2": 0.8}
RESOLUTIONS = {224: [224, 192, 160, 128], 32: [32, 28, 24]}


@dataclass
class Method:
    """A way of taking one training step, and what it needs beforehand."""

    name: str
    step: Callable[[int], object]
    prepare: Callable[[int], object] = lambda step: None
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    networks = ["resnet50:224:8", "wrn28_2:32:64"]
    parser.add_argument("--networks", nargs="+", default=networks, help="name:side in pixels:batch size")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each method")
    parser.add_argument("--width_divisor", type=int, default=1, help="channel counts are rounded to multiples of it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, {args.steps} steps each")
    print(f"width_divisor {args.width_divisor}\n")
    print("| network | batch | method | seconds | over plain | bound | over bound | peak MiB | over plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for network in args.networks:
        name, side, batch = network.split(":")
        measure(name, int(side), int(batch), args.steps, args.width_divisor, device)


def measure(name: str, side: int, batch: int, steps: int, divisor: int, device: torch.device) -> None:
    """Time the methods in turn and print their rows of the table."""
    torch.manual_seed(0)
    model = gradaug_hf.make_slimmable(timm.create_model(name), width_divisor=divisor).to(device).train()
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(0, model.num_classes, (batch,), device=device)
    gradaug = gradaug_hf.GradAug(
        model, num_subnets=3, min_width=MIN_WIDTH.get(name, 0.9), resolutions=RESOLUTIONS.get(side, [side])
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)

    def plain(step: int) -> None:
        nn.functional.cross_entropy(model(images), labels).backward()

    def sequential(step: int) -> None:
        gradaug.backward(images, labels, step)

    def joint(step: int) -> None:
        gradaug.loss(images, labels, step).backward()

    narrow: list[nn.Module] = []

    def extract(step: int) -> None:
        narrow[:] = [gradaug_hf.extract_subnet(model, subnet.width) for subnet in gradaug.sampler.sample(step)]

    def dense(step: int) -> None:
        logits = model(images)
        nn.functional.cross_entropy(logits, labels).backward()
        for network, subnet in zip(narrow, gradaug.sampler.sample(step), strict=True):
            soft_target_divergence(network(resize(images, subnet.resolution)), logits.detach()).backward()

    methods = [
        Method("plain", plain),
        Method("GradAug, sequential", sequential),
        Method("GradAug, joint", joint),
        Method("dense", dense, extract),
    ]
    for step in range(-1, steps):
        for method in methods:
            method.prepare(max(step, 0))
            start = time.perf_counter()
            take_step(method, max(step, 0), optimizer, device)
            if step >= 0:
                method.seconds.append(time.perf_counter() - start)
    del narrow[:]
    # One step with the largest images shows the peak; it is the same draw for both ways of going backward.
    widest = max(range(steps), key=lambda step: sum(s.resolution or side for s in gradaug.sampler.sample(step)))
    for method in methods[:3]:
        work = partial(take_step, method, widest, optimizer, device)
        method.peak = peak_memory(work, device, optimizer)
    bound = 1 + sum(relative_cost(gradaug.sampler.sample(step), side) for step in range(steps)) / steps
    print_rows(name, batch, methods, bound)


def take_step(method: Method, step: int, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    optimizer.zero_grad()
    method.step(step)
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_cost(subnets: list[gradaug_hf.Subnet], side: int) -> float:
    return sum((subnet.width * (subnet.resolution or side) / side) ** 2 for subnet in subnets)


def peak_memory(work: Callable[[], None], device: torch.device, optimizer: torch.optim.Optimizer) -> float:
    """Peak of the memory in tensors while a step runs, in MiB: parameters, momentum, gradients and activations."""
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / 2**20
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    momentum = [buffer for p in parameters for buffer in optimizer.state[p].values()]
    held = sum(tensor.nbytes for tensor in (*parameters, *momentum))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return (held + peak) / 2**20


def print_rows(name: str, batch: int, methods: list[Method], bound: float) -> None:
    plain = methods[0]
    for method in methods:
        seconds = sum(method.seconds) / len(method.seconds)
        ratio = sum(method.seconds) / sum(plain.seconds)
        own_bound = 1.0 if method is plain else bound
        memory = f"{method.peak:.0f} | {method.peak / plain.peak:.2f}" if method.peak else " | "
        print(
            f"| {name} | {batch} | {method.name} | {seconds:.3f} | {ratio:.2f} | {own_bound:.2f} "
            f"| {ratio / own_bound:.2f} | {memory} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
