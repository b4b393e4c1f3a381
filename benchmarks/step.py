"""Time and peak memory of a GradAug step beside those of a plain step, with the arithmetic bound.

    python benchmarks/step.py
    python benchmarks/step.py --networks wrn28_2:32:64 --settings float32 fast --methods plain sequential
    python benchmarks/step.py --networks resnet50:224:64 --settings bfloat16+channels_last+levels3+compiled

The steps of all rows of a network take turns in one process, so that whatever else the machine does falls on all.
Settings are joined by a plus: float32 (the default of all), bfloat16 (autocast), channels_last, divisor8 and so on
(`width_divisor`), levels5 and so on (`width_levels`), compiled (torch.compile, which needs levels); `fast` is the
preset of that name. Rows:

- paper: a loop of plain PyTorch as the paper has it: float32, contiguous, channels rounded to one, continuous widths.
  Its slices are this package's; all else is written out here.
- plain: cross-entropy of the full network alone.
- sequential, joint: GradAug, with a backward for each pass or one for all.
- split: sequential, with each sub-network on its own part of the batch (`subnet_images="split"`).
- light: sequential, with the sub-networks of the preset of that name.
- dense: the same sub-networks as ordinary narrow networks (`extract_subnet`, not timed) in place of slices: what is
  beyond its time is the slicing's.

The bound is the multiply-adds of the sub-networks over those of the full network, width squared times side squared as
the paper counts them (arXiv 2006.07989), plus one for the full network; "counted" has the multiply-adds of forward and
backward that torch's counter finds, with rounded widths and layers that are not sliced. Each sub-network takes the
resolutions in turn. Beside the table stands what the data loader alone gives.
"""

import argparse
import copy
import functools
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import timm
import torch
from loader import images_per_second
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import gradaug_hf
from gradaug_hf.experiments.presets import PRESETS, preset_settings
from gradaug_hf.objective.losses import soft_target_divergence
from gradaug_hf.objective.resolutions import default_resolutions
from gradaug_hf.objective.sampling import drops_blocks
from gradaug_hf.objective.transforms import resize
from gradaug_hf.slimming.widths import num_droppable_blocks, subnet_pass

NETWORKS = [("resnet50", 224, 8), ("wrn28_10", 32, 16), ("vit_small_patch16_224", 224, 8), ("convnext_tiny", 224, 8)]
SETTINGS = ["float32", "channels_last", "bfloat16", "fast"]
METHODS = ["paper", "plain", "sequential", "split", "light", "joint", "dense"]
CIFAR_SIDE, CIFAR_RESOLUTIONS = 32, [32, 28, 24]
HEADER = (
    "| network | batch | settings | step | seconds | images/s | over plain | bound | counted | over bound "
    "| peak MiB | over plain | over the paper's loop |"
)


@dataclass(frozen=True)
class Settings:
    """Settings of one block of rows, by the names of GradAugConfig."""

    name: str
    bf16: bool = False
    channels_last: bool = False
    width_divisor: int = 1
    width_levels: int | None = None
    compiled: bool = False


@dataclass
class Row:
    """A way of taking one training step, and what it needs beforehand."""

    settings: Settings
    name: str
    step: Callable[[int], object]
    optimizer: torch.optim.Optimizer
    prepare: Callable[[int], object] = lambda step: None
    bound: float = 1.0
    counted: float = 1.0
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0

    @property
    def finite(self) -> bool:
        return self.name == "plain" or self.settings.width_levels is not None


class BalancedSampler(gradaug_hf.SubnetSampler):
    """Random widths, the same for all settings up to rounding to levels; the resolutions in turn."""

    def sample(self, step: int) -> list[gradaug_hf.Subnet]:
        continuous = gradaug_hf.SubnetSampler(**vars(self) | {"resolutions": None, "width_levels": None}).sample(step)
        sides = [self.resolutions[(step + i) % len(self.resolutions)] for i in range(self.num_subnets)]
        return [
            replace(s, width=self._level(s.width), resolution=side) for s, side in zip(continuous, sides, strict=True)
        ]

    def _level(self, width: float) -> float:
        if self.width_levels is None:
            return width
        spacing = (self.max_width - self.min_width) / (self.width_levels - 1)
        return self.min_width + spacing * round((width - self.min_width) / spacing)


class Autocast(nn.Module):
    """A network in bfloat16 autocast, which ends before the loss as the Trainer's does."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.device_type = device.type

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            return self.network(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", default=NETWORKS, type=parse_network, help="name:side in pixels:batch size"
    )
    parser.add_argument("--settings", nargs="+", default=SETTINGS, type=parse_settings)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each row, best a multiple of 4")
    parser.add_argument(
        "--repeats", type=int, default=1, help="times that each step is measured, of which the lowest counts"
    )
    parser.add_argument(
        "--cpu_time", action="store_true", help="measure CPU time, for a machine that other work shares"
    )
    parser.add_argument("--workers", type=int, default=2, help="of the data loader; 0 leaves it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    settings = [each if isinstance(each, Settings) else parse_settings(each) for each in args.settings]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.steps} steps each,", end=" ")
    print(f"lowest of {args.repeats}{' of CPU time' if args.cpu_time else ''}\n")
    print(f"{HEADER}\n{'|---' * HEADER.count(' | ')}|---|")
    loaders = {}
    for name, side, batch in args.networks:
        rows = make_rows(name, side, batch, settings, args.methods, device)
        measure(rows, args.steps, args.repeats, device, time.process_time if args.cpu_time else time.perf_counter)
        print_rows(name, batch, rows)
        if args.workers:
            loaders[side] = images_per_second(side, batch, args.workers)
    for side, rate in loaders.items():
        print(f"\ndata loader alone, {side} pixels, {args.workers} workers: {rate:.0f} images/s", end="")
    print()


def parse_network(text: str) -> tuple[str, int, int]:
    name, *numbers = text.split(":")
    if len(numbers) != 2 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} must be name:side:batch, for example resnet50:224:8")
    return name, int(numbers[0]), int(numbers[1])


def parse_settings(text: str) -> Settings:
    if text == "fast":
        return Settings(text, **{k: v for k, v in preset_settings("fast").items() if k != "use_cpu"})
    chosen = {}
    for part in text.split("+"):
        if part.startswith("divisor") and part[7:].isdigit():
            chosen["width_divisor"] = int(part[7:])
        elif part.startswith("levels") and part[6:].isdigit():
            chosen["width_levels"] = int(part[6:])
        elif part in ("bfloat16", "channels_last", "compiled"):
            chosen["bf16" if part == "bfloat16" else part] = True
        elif part != "float32":
            raise argparse.ArgumentTypeError(f"{text!r} holds {part!r}, which is no setting; see --help")
    if chosen.get("compiled") and "width_levels" not in chosen:
        raise argparse.ArgumentTypeError(f"{text!r} compiles continuous widths; add levels3, for example")
    return Settings(text, **chosen)


def make_rows(
    name: str, side: int, batch: int, settings: Sequence[Settings], methods: Sequence[str], device: torch.device
) -> list[Row]:
    rows = []
    if "paper" in methods:
        paper = Settings("float32")
        rows += rows_of(name, side, batch, paper, ["paper"], device)
    for each in settings:
        own = [method for method in methods if method != "paper" and not (each.compiled and method == "dense")]
        rows += rows_of(name, side, batch, each, own, device)
    return rows


def rows_of(
    name: str, side: int, batch: int, settings: Settings, methods: Sequence[str], device: torch.device
) -> list[Row]:
    """The rows of a network of one's own with some settings."""
    torch.manual_seed(0)
    network = timm.create_model(name, **({"dynamic_img_size": True} if name.startswith("vit") else {}))
    network = gradaug_hf.make_slimmable(network, width_divisor=settings.width_divisor).to(device).train()
    if "light" in methods:
        network = gradaug_hf.make_droppable(network)
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(0, network.num_classes, (batch,), device=device)
    if settings.channels_last:
        network = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    model = prepared(network, settings, device)
    min_width, resolutions = (0.8, CIFAR_RESOLUTIONS) if side == CIFAR_SIDE else (0.9, default_resolutions(side))
    sampler = BalancedSampler(3, min_width, 1.0, resolutions, settings.width_levels)
    gradaug = gradaug_hf.GradAug(model, sampler=sampler)
    on_parts = gradaug_hf.GradAug(model, sampler=replace(sampler, subnet_images="split"))
    lightly = gradaug_hf.GradAug(model, sampler=replace(sampler, **PRESETS["light"]))
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True)
    narrow: list[nn.Module] = []

    def paper(step: int) -> None:
        logits = model(images)
        functional.cross_entropy(logits, labels).backward()
        target = functional.softmax(logits.detach(), dim=1)
        for subnet in sampler.sample(step):
            size = (subnet.resolution, subnet.resolution)
            smaller = functional.interpolate(images, size, mode="bilinear", align_corners=True)
            with subnet_pass(model, subnet.width):
                predicted = functional.log_softmax(model(smaller), dim=1)
                functional.kl_div(predicted, target, reduction="batchmean").backward()

    def plain(step: int) -> None:
        functional.cross_entropy(model(images).float(), labels).backward()

    def sequential(step: int) -> None:
        gradaug.backward(images, labels, step)

    def split(step: int) -> None:
        on_parts.backward(images, labels, step)

    def light(step: int) -> None:
        lightly.backward(images, labels, step)

    def joint(step: int) -> None:
        gradaug.loss(images, labels, step).backward()

    def extract(step: int) -> None:
        for subnet in sampler.sample(step):
            dense_network = gradaug_hf.extract_subnet(network, subnet.width)
            if settings.channels_last:
                dense_network = dense_network.to(memory_format=torch.channels_last)
            narrow.append(prepared(dense_network, settings, device))

    def dense(step: int) -> None:
        logits = model(images)
        functional.cross_entropy(logits.float(), labels).backward()
        for dense_model, subnet in zip(narrow, sampler.sample(step), strict=True):
            soft_target_divergence(dense_model(resize(images, subnet.resolution)), logits.detach()).backward()
        narrow.clear()

    steps = {
        "paper": paper,
        "plain": plain,
        "sequential": sequential,
        "split": split,
        "light": light,
        "joint": joint,
        "dense": dense,
    }
    rows = [Row(settings, method, steps[method], optimizer) for method in methods]
    for row in rows:
        if row.name == "dense":
            row.prepare = extract
        if row.name != "plain":
            own = {"split": on_parts, "light": lightly}.get(row.name, gradaug).sampler
            row.bound = 1 + own.subnet_share * mean_bound(own, side)
            row.counted = 1 + own.subnet_share * multiply_adds(network, side, own)
    return rows


def prepared(network: nn.Module, settings: Settings, device: torch.device) -> nn.Module:
    model = Autocast(network, device) if settings.bf16 else network
    return torch.compile(model, dynamic=False, recompile_limit=64) if settings.compiled else model


def measure(rows: Sequence[Row], steps: int, repeats: int, device: torch.device, clock: Callable[[], float]) -> None:
    """Time the rows in turn, then show the peak memory of each."""
    for row in rows:
        # Kernels of a finite number of widths are prepared once; with continuous ones each step prepares new ones.
        for step in range(steps) if row.finite and row.name != "plain" else (0, 0):
            row.prepare(step)
            take_step(row, step, device)
    for step in range(steps):
        times: list[list[float]] = [[] for _ in rows]
        for _ in range(repeats):
            for row, own in zip(rows, times, strict=True):
                row.prepare(step)
                start = clock()
                take_step(row, step, device)
                own.append(clock() - start)
        for row, own in zip(rows, times, strict=True):
            row.seconds.append(min(own))
    for row in rows:
        if row.name != "dense":
            row.peak = peak_memory(row, device)


def take_step(row: Row, step: int, device: torch.device) -> None:
    row.optimizer.zero_grad()
    row.step(step)
    row.optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mean_bound(sampler: BalancedSampler, side: int) -> float:
    """Multiply-adds of the sub-networks over those of the full network, as the paper counts them."""
    steps = [sampler.sample(step) for step in range(12)]
    kept = (1 + sampler.min_survival) / 2 if drops_blocks(sampler.subnet_mode) else 1
    return sum(kept * (s.width * s.resolution / side) ** 2 for subnets in steps for s in subnets) / len(steps)


def multiply_adds(network: nn.Module, side: int, sampler: BalancedSampler) -> float:
    """Multiply-adds of the sub-networks of a step over those of the full network, counted on the meta device."""
    network = copy.deepcopy(network).to("meta")

    @functools.cache
    def count(width: float, resolution: int, dropped: frozenset[int]) -> int:
        with FlopCounterMode(display=False) as counter, subnet_pass(network, width, dropped):
            network(torch.empty(2, 3, resolution, resolution, device="meta")).sum().backward()
        return counter.get_total_flops()

    blocks = num_droppable_blocks(network)
    steps = [sampler.sample(step) for step in range(12)]
    found = [count(s.width, s.resolution, s.dropped_blocks(blocks)) for subnets in steps for s in subnets]
    return sum(found) / len(steps) / count(1.0, side, frozenset())


def peak_memory(row: Row, device: torch.device) -> float:
    """Peak of the memory in tensors while a step runs, in MiB: parameters, momentum, gradients and activations."""
    row.optimizer.zero_grad()
    parameters = [p for group in row.optimizer.param_groups for p in group["params"]]
    held = [*parameters, *(buffer for p in parameters for buffer in row.optimizer.state[p].values())]
    before = sum(tensor.nbytes for tensor in held)
    if device.type == "cuda":  # other rows have parameters too
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        take_step(row, 0, device)
        return (before + torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        take_step(row, 0, device)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return (before + peak) / 2**20


def print_rows(name: str, batch: int, rows: Sequence[Row]) -> None:
    plains = {row.settings.name: row for row in rows if row.name == "plain"}
    paper = next((row for row in rows if row.name == "paper"), None)
    for row in rows:
        seconds = sum(row.seconds) / len(row.seconds)
        plain = plains.get(row.settings.name)
        ratio = sum(row.seconds) / sum(plain.seconds) if plain else None
        own_peak, memory = (f"{row.peak:.0f}" if row.peak else ""), row.peak / plain.peak if plain else None
        faster = sum(paper.seconds) / sum(row.seconds) if paper and row.name != "plain" else None
        cells = [
            *(name, batch, row.settings.name, row.name, f"{seconds:.3f}", f"{batch / seconds:.1f}", _two(ratio)),
            *(_two(row.bound), _two(row.counted), _two(ratio and ratio / row.bound)),
            *(own_peak, _two(memory or None), f"{_two(faster)}x" if faster else ""),
        ]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _two(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


if __name__ == "__main__":
    main()
