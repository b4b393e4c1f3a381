import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train_in_processes import train

ROOT = Path(__file__).parents[1]
STEPS = 10
SETTINGS = (
    f"--max_steps {STEPS} --min_width 0.5 --resolutions 16 12 --optim sgd --learning_rate 0.2 --report_to none "
    "--use_cpu --save_strategy no --logging_steps 5 --disable_tqdm true"
)


def train_in_two_processes(folder: Path, flags: list[str]) -> list[dict]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launcher, str(ROOT / "tests/train_in_processes.py"), "--output_dir", str(folder), *flags],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [rank["processes"] for rank in ranks] == [2, 2]
    return ranks


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_processes_train_like_one_with_the_whole_batch(tmp_path, accumulation):
    alone = train(["--output_dir", str(tmp_path), *SETTINGS.split(), "--per_device_train_batch_size", "8"])
    halves = f"--per_device_train_batch_size {4 // accumulation} --gradient_accumulation_steps {accumulation}"
    ranks = train_in_two_processes(tmp_path, [*SETTINGS.split(), *halves.split()])
    for rank in ranks:
        assert rank["reductions"] == STEPS  # the network's gradients fit one bucket, reduced once in a step
        for name, tensor in alone["weights"].items():
            torch.testing.assert_close(rank["weights"][name], tensor, rtol=0, atol=1e-10)
    assert ranks[0]["drawn"] == ranks[1]["drawn"]
    for log, expected in zip(ranks[0]["log"], alone["log"], strict=True):
        for key in ("loss", "loss_full", "loss_subnets", "subnet_width", "subnet_resolution"):
            assert log[key] == pytest.approx(expected[key], abs=1e-5)
