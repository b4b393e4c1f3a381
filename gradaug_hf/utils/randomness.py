"""Random numbers of Python, NumPy and torch that leave no trace in the global ones."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

CPU = torch.device("cpu")


@contextmanager
def random_states_kept(device: torch.device = CPU) -> Iterator[None]:
    """Give back the global random numbers as they were, those of torch on the CPU and on a device."""
    python, numpy = random.getstate(), np.random.get_state()
    devices, device_type = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    try:
        with torch.random.fork_rng(devices=devices, device_type=device_type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Seed the global random numbers, those of torch on the CPU and on a device; the former come back on leaving.

    Args:
        seed: at least 0.
        device: of the random numbers that are used inside.
    """
    with random_states_kept(device):
        seed_everything(seed)
        if device.type != "cpu":
            torch.get_device_module(device.type).manual_seed(seed)
        yield


def seed_everything(seed: int) -> None:
    """Seed the global random numbers of Python, NumPy and torch on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
