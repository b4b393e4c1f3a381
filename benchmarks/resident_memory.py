"""Peak of the resident memory of whole training processes on the CPU, plain and with GradAug.

    python benchmarks/resident_memory.py --network resnet50:224:16 --steps 8
    python benchmarks/resident_memory.py --environments "" ONEDNN_PRIMITIVE_CACHE_CAPACITY=16

The allocator keeps some of what a step has freed, and the library of kernels keeps kernels, so that a process holds
more than its tensors (those are in the tables of benchmarks/step.py). Every row is a process of its own. A step is
forward, backward and SGD with momentum in float32; GradAug samples new widths for its three sub-networks in each step.
Every environment is a few variables with spaces between them. Columns:

- peak: the most resident memory since the process started, Python and its libraries included.
- over plain: that over the peak of the first row.
- CPU seconds: of a step, the mean without the first.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping

import timm
import torch
from step import parse_network
from torch.nn import functional

from gradaug_hf import GradAug, make_slimmable
from gradaug_hf.experiments.memory import PeakMemory
from gradaug_hf.objective.resolutions import default_resolutions

STEPS = ["plain", "GradAug"]
HEADER = "| step | environment | peak MiB | over plain | CPU seconds |\n|---|---|--:|--:|--:|"
NUM_SUBNETS, MIN_WIDTH = 3, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network", default="resnet50:224:16", type=parse_network, help="name:side in pixels:batch size"
    )
    parser.add_argument("--environments", nargs="+", default=[""], type=parse_environment)
    parser.add_argument("--steps", type=int, default=8, help="steps of each process")
    parser.add_argument("--row", choices=STEPS, help="take the steps in this process, and print what they took")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(take_steps(args.row, args.network, args.steps)))
        return
    print(HEADER)
    plain = None
    for environment in args.environments:
        for name in STEPS:
            peak, seconds = in_own_process(name, args.network, args.steps, environment)
            plain = plain or peak
            words = " ".join(f"{key}={value}" for key, value in environment.items())
            print(f"| {name} | {words} | {peak:,.0f} | {peak / plain:.2f} | {seconds:.2f} |", flush=True)


def parse_environment(text: str) -> dict[str, str]:
    """Return the variables of a text such as "A=1 B=2"."""
    variables = [word.partition("=") for word in text.split()]
    if not all(key and sign for key, sign, _ in variables):
        raise argparse.ArgumentTypeError(f"{text!r} must be variables such as A=1 with a space between them")
    return {key: value for key, _, value in variables}


def in_own_process(
    name: str, network: tuple[str, int, int], steps: int, environment: Mapping[str, str]
) -> tuple[float, float]:
    """Return the peak in MiB and the CPU seconds of a step, of a process with some environment variables."""
    flags = f"--row {name} --network {':'.join(map(str, network))} --steps {steps}"
    command = [sys.executable, __file__, *flags.split()]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    peak, seconds = json.loads(done.stdout)
    return peak, seconds


def take_steps(name: str, network: tuple[str, int, int], steps: int) -> tuple[float, float]:
    """Take steps, and return the peak of this process in MiB and the CPU seconds of a step."""
    architecture, side, batch = network
    torch.manual_seed(0)
    with PeakMemory(torch.device("cpu")) as peak:
        model = make_slimmable(timm.create_model(architecture)).train()
        images = torch.randn(batch, 3, side, side)
        labels = torch.randint(0, model.num_classes, (batch,))
        gradaug = GradAug(model, num_subnets=NUM_SUBNETS, min_width=MIN_WIDTH, resolutions=default_resolutions(side))
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
        seconds = []
        for step in range(steps):
            start = time.process_time()
            optimizer.zero_grad()
            if name == "plain":
                functional.cross_entropy(model(images), labels).backward()
            else:
                gradaug.backward(images, labels, step)
            optimizer.step()
            seconds.append(time.process_time() - start)
    return peak.mebibytes, sum(seconds[1:]) / max(1, steps - 1)


if __name__ == "__main__":
    main()
