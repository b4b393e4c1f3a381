"""CPU threads of a launched process."""

import os

import psutil
import torch

from gradaug_hf.utils.launch import process_state

# Set by accelerate's and torch's launchers.
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE")


def use_all_cores() -> None:
    """Share the cores of a machine without an accelerator among its processes.

    `accelerate launch` and `torchrun` leave a process a single thread where they are not told otherwise. A number
    above one stays as it is, and so does `OMP_NUM_THREADS=1` of a process that was not launched by them.
    """
    state = process_state()
    threads = os.environ.get("OMP_NUM_THREADS")
    chosen = threads is not None and (threads != "1" or not any(name in os.environ for name in LAUNCHERS))
    if state.device.type == "cpu" and not chosen:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // local_processes))
