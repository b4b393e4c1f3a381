"""How the processes that a launcher started find each other, and share the cores of a machine."""

import os

import psutil
import torch
from accelerate import PartialState

# Set by accelerate's and torch's launchers.
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE")
# Set by launchers for each of several processes.
RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
CPU_LAUNCH = "accelerate launch --config_file recipes/accelerate/cpu_2.yaml SCRIPT"


def process_state() -> PartialState:
    """Return accelerate's state of this process, which is made if need be; on the CPU processes meet over gloo."""
    return PartialState(cpu=meets_on_cpu())


def leave_group() -> None:
    """Leave the group of processes, while Python still runs.

    Threads of gloo may hold tensors, and where they free them as Python ends, the process ends by SIGABRT
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    process_state().destroy_process_group()


def meets_on_cpu() -> bool:
    """Return whether this is one of several processes on a machine without an accelerator.

    Where it is not told that it runs on the CPU, accelerate takes each of them for a run of its own.
    """
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()


def check_processes() -> None:
    """Raise a ValueError if `accelerate launch --cpu --num_processes 2` or the like started this process alone."""
    asked_for_several = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if asked_for_several and not any(name in os.environ for name in RANKS):
        raise ValueError(
            "accelerate launch --cpu was asked for several processes, but starts one unless MPI does; "
            f"for several on the CPU: {CPU_LAUNCH}"
        )


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
