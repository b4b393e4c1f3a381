"""Runs a script with the CPU taken for a device that FSDP2 divides parameters over.

accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 tests/helpers/run_sharded.py SCRIPT
"""

import runpy
import sys

import torch.distributed as dist

from tests.helpers.sharding import shard_on_cpu

if __name__ == "__main__":
    shard_on_cpu()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if dist.is_initialized():
        raise RuntimeError(f"{sys.argv[0]} has not left the group of its processes")
