"""Peak memory of a piece of work."""

import ctypes
import gc
import re
import sys
from pathlib import Path
from types import TracebackType

import torch

# Linux' record of a process, and the file that starts the record of its peak anew.
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
START_PEAK_ANEW = "5"


class PeakMemory:
    """Measure the peak memory of the work inside a context.

    On a GPU it is the memory of torch's allocator, on the CPU the resident memory of the process by Linux' record;
    elsewhere that since the process started. The Trainer's own `skip_memory_metrics=False` has a thread read the
    memory without pause, which takes a core from a training on the CPU.

        with PeakMemory(device) as peak:
            train()
        print(peak.mebibytes)

    Args:
        device: Device on which the work runs.
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
