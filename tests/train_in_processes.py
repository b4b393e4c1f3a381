"""Trains a small network without batch norm for a few steps; every process writes its weights and what it counted.

accelerate launch --cpu --num_processes 2 tests/train_in_processes.py --output_dir DIR ...
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import HfArgumentParser, TrainerCallback

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.subnets import SubnetSampler


class CountReductions(TrainerCallback):
    """Counts how often gradients cross the processes."""

    def __init__(self) -> None:
        self.trainer: GradAugTrainer | None = None
        self.count = 0

    def on_train_begin(self, *args, **kwargs) -> None:
        if isinstance(self.trainer.model_wrapped, nn.parallel.DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, self.reduce)

    def reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.count += 1
        return allreduce_hook(None, bucket)


class RecordingSampler(SubnetSampler):
    def sample(self, step: int) -> list:
        subnets = super().sample(step)
        self.drawn = [*getattr(self, "drawn", []), (step, subnets)]
        return subnets


def train(flags: list[str] | None = None) -> dict:
    (args,) = HfArgumentParser(GradAugConfig).parse_args_into_dataclasses(flags)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 5),
    ).double()  # fmt: skip
    images = torch.randn(32, 3, 16, 16, dtype=torch.float64)
    rows = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images)]
    counter = CountReductions()
    sampler = RecordingSampler(3, args.min_width, 1.0, args.resolutions, seed=args.seed)
    trainer = GradAugTrainer(network, args, train_dataset=rows, callbacks=[counter], subnet_sampler=sampler)
    counter.trainer = trainer
    trainer.train()
    return {
        "weights": network.state_dict(),
        "reductions": counter.count,
        "drawn": repr(sampler.drawn),
        "processes": args.world_size,
        "log": [log for log in trainer.state.log_history if "loss" in log],
        "output_dir": args.output_dir,
    }


if __name__ == "__main__":
    found = train()
    torch.save(found, Path(found["output_dir"]) / f"rank{os.environ['RANK']}.pt")
