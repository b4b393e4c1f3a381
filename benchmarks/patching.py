"""Time of `make_slimmable` beside that of a training step of the same network.

    python benchmarks/patching.py

Patching must cost less than five training steps at batch size 8.
"""

import argparse
import time

import timm
import torch
from torch import nn

import gradaug_hf

NETWORKS = ["resnet50", "vit_base_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="architectures of timm")
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, batch size {args.batch_size}\n")
    print("| network | patching, s | training step, s | patching in steps |")
    print("|---|---|---|---|")
    for name in args.networks:
        model = timm.create_model(name).train()
        images = torch.randn(args.batch_size, *model.pretrained_cfg["input_size"])
        labels = torch.randint(0, model.num_classes, (args.batch_size,))
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        step_seconds = min(timed_step(model, images, labels, optimizer) for _ in range(3))
        start = time.perf_counter()
        gradaug_hf.make_slimmable(model)
        seconds = time.perf_counter() - start
        print(f"| {name} | {seconds:.2f} | {step_seconds:.2f} | {seconds / step_seconds:.2f} |", flush=True)


def timed_step(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, optimizer: torch.optim.Optimizer
) -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
