"""Memory of a training: what it takes at least, and what it took."""

import ctypes
import gc
import re
import sys
from pathlib import Path
from types import TracebackType

import psutil
import torch
from torch import Tensor, nn

from gradaug_hf.slimming.meta import example_images, meta_copy
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.utils.randomness import random_states_kept

# Linux' record of a process, and the file that starts the record of its peak anew.
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
START_PEAK_ANEW = "5"


class PeakMemory:
    """Measure the peak memory of the work on a device inside a context.

    On a GPU it is the memory of torch's allocator, on the CPU the resident memory of the process by Linux' record;
    elsewhere that since the process started. The Trainer's own `skip_memory_metrics=False` has a thread read the
    memory without pause, which takes a core from a training on the CPU.

        with PeakMemory(device) as peak:
            train()
        print(peak.mebibytes)
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.mebibytes = 0.0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR.exists():
            _return_freed_memory()
            CLEAR.write_text(START_PEAK_ANEW)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.mebibytes = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            self.mebibytes = _peak_of_process()


def _peak_of_process() -> float:
    peak = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    if peak is not None:
        return int(peak[1]) / 2**10
    from resource import RUSAGE_SELF, getrusage  # not on Windows

    return getrusage(RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _return_freed_memory() -> None:
    """Return to the system what earlier work freed, where the C library can."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's alone
        trim(0)


def memory_of_step(model: nn.Module, batch: int, side: int) -> int:
    """Return the bytes that a training step takes at least: weights, gradients, momentum and what a backward needs.

    The model runs on the meta device, where nothing is computed. Sub-networks run one after the other and take less.
    """
    shapes = meta_copy(model).train()
    weights = {parameter.untyped_storage()._cdata for parameter in shapes.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with random_states_kept(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = shapes(example_images(shapes, batch, (3, side, side)))
    activations = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    del output  # which held what the backward would need
    return activations + 3 * sum(parameter.nbytes for parameter in shapes.parameters())


def check_memory(model: nn.Module, batch: int, side: int, config: GradAugConfig) -> None:
    """Raise a ValueError where a training step on the CPU would end the process for want of memory.

    An accelerator raises an error instead, and the batch that it can hold depends on its kernels.
    """
    if config.device.type != "cpu":
        return
    try:
        least = memory_of_step(model, batch, side)
    except Exception:  # a model may raise anything where it cannot run on the meta device or at this size
        return
    least //= 2 if config.bf16 or config.fp16 else 1  # at best all that is kept is of half the size
    memory = psutil.virtual_memory()
    available = memory.available + psutil.swap_memory().free
    if least > available:
        raise ValueError(
            f"a step on {batch} images of {side} pixels takes at least {least / 2**30:.1f} GiB, and "
            f"{available / 2**30:.1f} GiB are available; give a larger gradient_accumulation_steps, which splits the "
            "batch, or a smaller batch_size"
        )
