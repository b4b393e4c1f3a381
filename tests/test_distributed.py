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


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "mode, accumulation, flags",
    [
        slow("width", 1, ""),
        slow("width", 2, ""),
        slow("depth", 1, ""),
        slow("depth", 1, "--subnet_backward joint"),
        slow("depth", 1, "--ddp_find_unused_parameters true"),
        ("width+depth", 2, ""),
    ],
)
def test_two_processes_train_like_one_with_the_whole_batch(tmp_path, mode, accumulation, flags):
    settings = [*SETTINGS.split(), "--subnet_mode", mode, "--min_survival", "0.4", *flags.split()]
    alone = train(["--output_dir", str(tmp_path), *settings, "--per_device_train_batch_size", "8"])
    halves = f"--per_device_train_batch_size {4 // accumulation} --gradient_accumulation_steps {accumulation}"
    ranks = train_in_two_processes(tmp_path, [*settings, *halves.split()])
    for rank in ranks:
        assert rank["reductions"] == STEPS  # the network's gradients fit one bucket, reduced once in a step
        for name, tensor in alone["weights"].items():
            torch.testing.assert_close(rank["weights"][name], tensor, rtol=0, atol=1e-10)
    assert_same_draws(ranks)
    keys = ["loss", "loss_full", "loss_subnets", "subnet_width", "subnet_resolution"]
    for log, expected in zip(ranks[0]["log"], alone["log"], strict=True):
        for key in [*keys, "subnet_depth"] if "depth" in mode else keys:
            assert log[key] == pytest.approx(expected[key], abs=1e-5)


def assert_same_draws(ranks: list[dict]) -> None:
    for what in ("drawn", "turns", "computed"):
        assert ranks[0][what] == ranks[1][what]
    assert len(set(ranks[0]["turns"])) > 1


def test_ranks_share_subnetworks_transforms_and_dropped_blocks_but_neither_images_nor_mixes(tmp_path):
    flags = "--subnet_mode depth --min_survival 0.4 --mixup_alpha 1 --per_device_train_batch_size 4"
    ranks = train_in_two_processes(tmp_path, [*SETTINGS.split(), *flags.split()])
    assert_same_draws(ranks)
    computed = ranks[0]["computed"]
    passes = STEPS * 4
    assert computed.count("0") == passes
    assert computed.count("2") == passes  # the first block is never dropped
    assert STEPS < computed.count("5") < passes  # the last is, though not in the full network
    for first, second in zip(ranks[0]["batches"][:4], ranks[1]["batches"][:4], strict=True):
        assert not any(torch.equal(one, other) for one in first for other in second)
    shares = [[mixed_share(*step) for step in zip(rank["batches"], rank["mixed"], strict=False)] for rank in ranks]
    assert len(shares[0]) == len(shares[1]) == STEPS
    assert len({round(share, 6) for share in (*shares[0], *shares[1])}) == 2 * STEPS


def mixed_share(batch: torch.Tensor, mixed: torch.Tensor) -> float:
    """How much of each image is left when every one is mixed with its neighbour."""
    neighbours = batch.roll(1, 0)
    difference = batch - neighbours
    share = ((mixed - neighbours) * difference).sum() / difference.square().sum()
    torch.testing.assert_close(mixed, share * batch + (1 - share) * neighbours, rtol=0, atol=1e-6)
    return share.item()
