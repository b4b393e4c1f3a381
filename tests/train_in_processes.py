"""Trains a small residual network without batch norm for a few steps; every process writes its weights and draws.

accelerate launch --cpu --num_processes 2 tests/train_in_processes.py --output_dir DIR ...
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import HfArgumentParser, TrainerCallback, default_data_collator

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.subnets import SubnetSampler
from gradaug_hf.transforms import RandomQuarterTurn


class CountReductions(TrainerCallback):
    """Counts how often gradients cross the processes."""

    def __init__(self) -> None:
        self.trainer: GradAugTrainer | None = None
        self.count = 0

    def on_train_begin(self, *args, **kwargs) -> None:
        if isinstance(self.trainer.model_wrapped, nn.parallel.DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, self.reduce)

    def reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.count += 1
        return allreduce_hook(None, bucket)


class RecordingSampler(SubnetSampler):
    def sample(self, step: int) -> list:
        subnets = super().sample(step)
        self.drawn = [*getattr(self, "drawn", []), (step, subnets)]
        return subnets


class RecordingTurn(RandomQuarterTurn):
    """Remembers by how many quarters it turned."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        turned = super().forward(images)
        self.turns.append(next(k for k in range(4) if torch.equal(turned, images.rot90(k, dims=(2, 3)))))
        return turned


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(in_channels, channels, 1, stride)
        self.drop_path = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop_path(self.conv2(self.conv1(x).relu())) + self.shortcut(x))


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(8, 8, 1), Block(8, 12, 2), Block(12, 12, 1), Block(12, 12, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)]
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *blocks, *head).double()
    network.num_classes = 5
    return network


def train(flags: list[str] | None = None) -> dict:
    (args,) = HfArgumentParser(GradAugConfig).parse_args_into_dataclasses(flags)
    network = make_network()
    computed, batches, mixed = [], [], []
    for name, module in network.named_children():
        if isinstance(module, Block):
            module.conv1.register_forward_hook(lambda *_, name=name: computed.append(name))
        else:
            module.register_forward_hook(lambda *_, name=name: computed.append(name))

    def collate(rows: list[dict]) -> dict:
        batch = default_data_collator(rows)
        batches.append(batch["pixel_values"])
        return batch

    network.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    images = torch.randn(32, 3, 16, 16, dtype=torch.float64)
    rows = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images)]
    counter, turn = CountReductions(), RecordingTurn()
    sampler = RecordingSampler(
        3,
        args.min_width,
        1.0,
        args.resolutions,
        seed=args.seed,
        subnet_mode=args.subnet_mode,
        min_survival=args.min_survival,
    )
    trainer = GradAugTrainer(
        network,
        args,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[counter],
        subnet_sampler=sampler,
        subnet_transform=turn,
    )
    batches.clear()  # the first image was looked at
    counter.trainer = trainer
    trainer.train()
    return {
        "weights": network.state_dict(),
        "reductions": counter.count,
        "drawn": repr(sampler.drawn),
        "turns": turn.turns,
        "computed": computed,
        "batches": batches,
        "mixed": mixed[:: 1 + args.num_subnets],
        "processes": args.world_size,
        "log": [log for log in trainer.state.log_history if "loss" in log],
        "output_dir": args.output_dir,
    }


if __name__ == "__main__":
    found = train()
    torch.save(found, Path(found["output_dir"]) / f"rank{os.environ['RANK']}.pt")
