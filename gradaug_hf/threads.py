"""CPU threads of a launched process."""

import os

import psutil
import torch
from accelerate import PartialState


def use_all_cores() -> None:
    """Share the cores of a machine without an accelerator among its processes.

    `accelerate launch` leaves a process a single thread where it is not told `--cpu` or a number of threads; a number
    above one stays as it is.
    """
    state = PartialState()
    if state.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // local_processes))
