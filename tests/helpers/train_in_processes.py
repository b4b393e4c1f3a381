"""Trains small networks for a few steps; every process writes its gradients, weights and samples.

accelerate launch --config_file recipes/accelerate/cpu_2.yaml tests/helpers/train_in_processes.py FOLDER

FOLDER/runs.json holds, by the name of a run, its network and its flags.
"""

import json
import os
import signal
import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import HfArgumentParser, TrainerCallback, default_data_collator

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.objective.sampling import SubnetSampler
from gradaug_hf.objective.transforms import RandomQuarterTurn
from tests.helpers import residual_network


class CountReductions(TrainerCallback):
    """Counts how often gradients cross the processes."""

    def __init__(self) -> None:
        self.trainer: GradAugTrainer | None = None
        self.count = 0

    def on_train_begin(self, *args, **kwargs) -> None:
        wrapped = self.trainer.model_wrapped
        wrapped = getattr(wrapped, "_orig_mod", wrapped)  # what torch.compile wraps
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped.register_comm_hook(None, self.reduce)

    def reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.count += 1
        return allreduce_hook(None, bucket)


class KeepGradients(TrainerCallback):
    """Keeps the gradients that each step of the optimiser is made with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.steps.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


class Die(TrainerCallback):
    """Kills the process of a rank in its third step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if os.environ.get("RANK", "") == os.environ.get("DYING_RANK") and state.global_step == 2:
            Path(args.output_dir).with_name("dying").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class RecordingSampler(SubnetSampler):
    def sample(self, step: int) -> list:
        subnets = super().sample(step)
        self.sampled = [*getattr(self, "sampled", []), (step, subnets)]
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


def with_batchnorm() -> nn.Module:
    network = residual_network.make_network()
    network.num_classes = 5
    return network


def of_timm() -> nn.Module:
    """A network whose batch norms have activations."""
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=5, drop_rate=0.0, drop_path_rate=0.0).double()


def without_batchnorm() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(8, 8, 1), Block(8, 12, 2), Block(12, 12, 1), Block(12, 12, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)]
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *blocks, *head).double()
    network.num_classes = 5
    return network


NETWORKS = {"plain": without_batchnorm, "batchnorm": with_batchnorm, "timm": of_timm}


def train(network_name: str, flags: str) -> dict:
    (args,) = HfArgumentParser(GradAugConfig).parse_args_into_dataclasses(flags.split())
    network = NETWORKS[network_name]()
    computed, batches, labels, mixed = [], [], [], []

    def collate(rows: list[dict]) -> dict:
        batch = default_data_collator(rows)
        batches.append(batch["pixel_values"])
        labels.append(batch["labels"])
        return batch

    images = torch.randn(32, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images)]
    counter, keeper, turn = CountReductions(), KeepGradients(), RecordingTurn()
    sampler = RecordingSampler.from_settings(args)
    trainer = GradAugTrainer(
        network,
        args,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[counter, keeper, Die()],
        subnet_sampler=sampler,
        subnet_transform=turn if network_name == "plain" else None,
    )
    # After slimming, which keeps layers with hooks whole; compiled hooks are compiled anew whenever a list has grown.
    if not args.torch_compile:
        for name, module in network.named_children():
            recorded = module.conv1 if isinstance(module, Block) else module
            recorded.register_forward_hook(lambda *_, name=name: computed.append(name))
        network.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    batches.clear()  # the first image was looked at
    labels.clear()
    counter.trainer = trainer
    counters.clear()
    trainer.train()
    return {
        "weights": {name: tensor.clone() for name, tensor in network.state_dict().items()},
        "gradients": keeper.steps,
        "reductions": counter.count,
        "graphs": counters["stats"]["unique_graphs"],
        "subnets": len({(subnet.width, subnet.resolution) for _, subnets in sampler.sampled for subnet in subnets}),
        "sampled": repr(sampler.sampled),
        "turns": turn.turns,
        "computed": computed,
        "batches": batches,
        "labels": labels,
        "mixed": mixed[:: 1 + args.num_subnets],
        "processes": args.world_size,
        "log": [log for log in trainer.state.log_history if "loss" in log],
    }


def main(folder: Path) -> None:
    runs = json.loads((folder / "runs.json").read_text())
    for name, (network_name, flags) in runs.items():
        found = train(network_name, f"--output_dir {folder / name} {flags}")
        torch.save(found, folder / f"{name}-rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
