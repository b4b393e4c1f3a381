"""Peak memory of a piece of work."""

import ctypes
import gc
import sys
import threading
from types import TracebackType

import psutil
import torch

SAMPLING_INTERVAL = 0.01  # seconds


class PeakMemory:
    """Context that measures the peak memory of what runs inside it.

    On a GPU that is what torch's allocator held; else the resident memory of the process, sampled a hundred times a
    second. What earlier work freed is first returned to the system, where the C library can.

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
        else:
            _return_freed_memory()
            self._process = psutil.Process()
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.mebibytes = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            self._done.set()
            self._thread.join()
            self._sample()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLING_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        self.mebibytes = max(self.mebibytes, self._process.memory_info().rss / 2**20)


def _return_freed_memory() -> None:
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc's alone
        trim(0)
