"""Memory of each process in a training step: DistributedDataParallel and FSDP2, plain and with GradAug.

    python benchmarks/memory.py --model vit_base_patch16_224 --batch_size 2 --processes 1 2

Processes meet over gloo on the CPU, or over NCCL with a GPU each. Every row is a start of its own: AdamW, whose state
is there already, and a step in float32. Columns, in MiB for the first process:

- kept: its part of weights and optimiser state, which stay from step to step.
- peak: the most that the step took, on a GPU of torch's allocator, on the CPU resident memory beyond that of
  the process before it made the model, with each tensor returned to the system once it is freed.

With FSDP2 blocks are divided one by one, and gathered anew for the backward. "held" has gradients whole on each
process till the last pass, "each" divides those of each pass.
"""

import argparse
import ctypes
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import psutil
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradaug_hf import GradAug, make_slimmable
from gradaug_hf.experiments.memory import PeakMemory
from gradaug_hf.slimming.depth import residual_blocks

HEADER = "| model | processes | wrapper | step | kept MiB | peak MiB |\n|---|--:|---|---|--:|--:|"
ROWS = [
    ("DDP", "plain"),
    ("DDP", "GradAug"),
    ("FSDP2", "plain"),
    ("FSDP2", "GradAug, held"),
    ("FSDP2", "GradAug, each"),
]
# Of glibc's mallopt: the size in bytes from which a block of memory is the system's own.
M_MMAP_THRESHOLD = -3
# A process that is forked need not import everything anew, but cannot use CUDA where its parent does.
START = "spawn" if torch.cuda.is_available() else "fork"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch_size", type=int, default=2, help="images on each process")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num_subnets", type=int, default=3)
    args = parser.parse_args()
    print(HEADER)
    for count in args.processes:
        for row in ROWS:
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(measure, (count, row, args, folder), count, start_method=START)
                kept, peak = torch.load(Path(folder) / "found.pt", weights_only=True)
            print(f"| {args.model} | {count} | {row[0]} | {row[1]} | {kept:,.0f} | {peak:,.0f} |", flush=True)


def measure(rank: int, count: int, row: tuple[str, str], args: argparse.Namespace, folder: str) -> None:
    """Write what the first process keeps, and the peak of a step, to a file of a folder."""
    torch.set_num_threads(1)
    return_what_is_freed()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if has_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if has_gpu else "gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    before = psutil.Process().memory_info().rss / 2**20
    torch.manual_seed(0)
    model = make_slimmable(timm.create_model(args.model)).to(device)
    side = model.pretrained_cfg["input_size"][1]
    images = torch.randn(args.batch_size, 3, side, side, device=device)
    labels = torch.arange(args.batch_size, device=device)
    wrapped = wrap(model, row[0])
    optimizer = torch.optim.AdamW(wrapped.parameters())
    step = plain_step if row[1] == "plain" else gradaug_step(wrapped, row, args.num_subnets)
    for parameter in wrapped.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    with PeakMemory(device) as peak:
        step(wrapped, images, labels)
        optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    kept = size_of(wrapped.parameters()) + size_of(states)
    if rank == 0:
        torch.save((kept, peak.mebibytes - (0 if has_gpu else before)), Path(folder) / "found.pt")
    dist.destroy_process_group()


def return_what_is_freed() -> None:
    """Have glibc give each tensor back to the system once it is freed, so that a peak has only what is held at once.

    It would keep those of up to 32 MiB for later, among them the gradients that cross block by block.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 2**16)


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    """Return a model whose gradients cross the processes."""
    if wrapper == "DDP":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    for name in list(residual_blocks(model)):
        fully_shard(model.get_submodule(name), reshard_after_forward=True)
    return fully_shard(model)


def plain_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Run forward and backward of the full model."""
    nn.functional.cross_entropy(model(images), labels).backward()


def gradaug_step(model: nn.Module, row: tuple[str, str], num_subnets: int) -> Callable[..., None]:
    """Return a function that runs forward and backward of all passes, as the trainer does."""
    gradaug = GradAug(model, num_subnets=num_subnets, resolutions=[model_side(model)])

    def run(model: nn.Module, images: Tensor, labels: Tensor) -> None:
        passes = gradaug.passes(images, labels, gradaug.sampler.sample(0))
        for number in range(num_subnets + 1):
            is_last = number == num_subnets
            if row == ("FSDP2", "GradAug, held"):
                model.set_requires_gradient_sync(is_last)
            with model.no_sync() if row[0] == "DDP" and not is_last else nullcontext():
                next(passes).loss.backward()
        passes.close()

    return run


def model_side(model: nn.Module) -> int:
    """Return the side of the images in pixels, which is that of every sub-network: a ViT takes no other."""
    return getattr(model, "module", model).pretrained_cfg["input_size"][1]


def size_of(tensors: Iterable[Tensor]) -> float:
    """Return the MiB of tensors in this process."""
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors) / 2**20


if __name__ == "__main__":
    main()
