import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gradaug_hf.objective.sampling import SubnetSampler
from gradaug_hf.utils.compat import compiles_stale_graphs
from tests.helpers.residual_network import gradients_by_hand
from tests.helpers.small_training import free_port, start_ranks, status_of
from tests.helpers.train_in_processes import main as train_runs
from tests.helpers.train_in_processes import train, with_batchnorm

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tests/helpers/train_in_processes.py")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu_2.yaml"]
STEPS = 10
LEARNING_RATE = 0.2
SETTINGS = (
    f"--max_steps {STEPS} --min_width 0.5 --resolutions 16 12 --optim sgd --learning_rate {LEARNING_RATE} --seed 3 "
    "--report_to none --save_strategy no --logging_steps 5 --disable_tqdm true --min_survival 0.4"
)
WHOLE, HALF, QUARTER = (f"--per_device_train_batch_size {size}" for size in (8, 4, 2))
ACCUMULATED = f"{QUARTER} --gradient_accumulation_steps 2"
BY_HAND = f"{SETTINGS} --lr_scheduler_type constant --max_grad_norm 0 --subnet_mode width"

EQUAL_TO_ONE_PROCESS = {
    "both_accumulated": ("plain", f"{SETTINGS} --subnet_mode width+depth", ACCUMULATED),
    "timm_synchronised": ("timm", f"{SETTINGS} --max_steps 3 --logging_steps 3 --sync_batchnorm", HALF),
}
MORE_EQUAL_TO_ONE_PROCESS = {
    "width": ("plain", f"{SETTINGS} --subnet_mode width", HALF),
    "width_accumulated": ("plain", f"{SETTINGS} --subnet_mode width", ACCUMULATED),
    "depth": ("plain", f"{SETTINGS} --subnet_mode depth", HALF),
    "depth_joint": ("plain", f"{SETTINGS} --subnet_mode depth --subnet_backward joint", HALF),
    "depth_unused": ("plain", f"{SETTINGS} --subnet_mode depth --ddp_find_unused_parameters true", HALF),
    "synchronised_depth": ("batchnorm", f"{SETTINGS} --subnet_mode width+depth --sync_batchnorm", HALF),
}
BY_HAND_RUNS = {
    "halves": ("batchnorm", BY_HAND, HALF),
    "synchronised": ("batchnorm", f"{BY_HAND} --sync_batchnorm", HALF),
    "split": ("batchnorm", f"{BY_HAND} --subnet_images split", HALF),
}
LEVELS = f"{BY_HAND} --width_levels 3 --resolutions 16 12 8"
LEVELS_RUN = {"levels": ("batchnorm", LEVELS, HALF)}
COMPILED_RUN = {"compiled": ("batchnorm", f"{LEVELS} --torch_compile --torch_compile_backend eager", HALF)}
MIXED_RUN = {"mixed": ("plain", f"{SETTINGS} --subnet_mode depth --mixup_alpha 1", HALF)}


def environment(**more: str) -> dict[str, str]:
    names = ("PATH", "HOME", "TMPDIR", "HF_HUB_OFFLINE")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def launch(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    """The script in two processes on the CPU, started as the README says."""
    command = [*LAUNCH, "--main_process_port", "0", SCRIPT, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=500)


def train_in_two_processes(folder: Path, runs: dict[str, tuple[str, str, str]]) -> dict[str, list[dict]]:
    """What each rank recorded of each run, all of them in two forks of this process, which need not import anew."""
    listed = {name: (network, f"{flags} {batch}") for name, (network, flags, batch) in runs.items()}
    (folder / "runs.json").write_text(json.dumps(listed))
    assert [status_of(rank) for rank in start_ranks(lambda: train_runs(folder))] == [0, 0]
    found = {}
    for name in runs:
        found[name] = [torch.load(folder / f"{name}-rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert [rank["processes"] for rank in found[name]] == [2, 2]
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("two")
    return train_in_two_processes(folder, {**EQUAL_TO_ONE_PROCESS, **BY_HAND_RUNS, **LEVELS_RUN, **MIXED_RUN})


@pytest.fixture(scope="module")
def more_in_two_processes(tmp_path_factory) -> dict[str, list[dict]]:
    return train_in_two_processes(tmp_path_factory.mktemp("more"), MORE_EQUAL_TO_ONE_PROCESS)


@pytest.mark.parametrize("name", EQUAL_TO_ONE_PROCESS)
def test_two_processes_train_like_one_with_the_whole_batch(tmp_path, name, two_processes):
    network, flags, _ = EQUAL_TO_ONE_PROCESS[name]
    assert_equal_to_one_process(tmp_path, network, flags, two_processes[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_EQUAL_TO_ONE_PROCESS)
def test_two_processes_train_like_one_by_every_setting(tmp_path, name, more_in_two_processes):
    network, flags, _ = MORE_EQUAL_TO_ONE_PROCESS[name]
    assert_equal_to_one_process(tmp_path, network, flags, more_in_two_processes[name])


def assert_equal_to_one_process(tmp_path: Path, network: str, flags: str, ranks: list[dict]) -> None:
    alone = train(network, f"--output_dir {tmp_path} --use_cpu {flags} {WHOLE}")
    assert alone["processes"] == 1
    for rank in ranks:
        assert len(rank["gradients"]) == len(alone["gradients"]) > 2
        for found, expected in zip(rank["gradients"], alone["gradients"], strict=True):
            assert_close(found, expected)
        assert_close(rank["weights"], alone["weights"])
    keys = ["loss", "loss_full", "loss_subnets", "subnet_width", "subnet_resolution"]
    if "depth" in flags:
        keys.append("subnet_depth")
    for log, expected in zip(ranks[0]["log"], alone["log"], strict=True):
        for key in keys:
            assert log[key] == pytest.approx(expected[key], abs=1e-5)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", [*EQUAL_TO_ONE_PROCESS, *BY_HAND_RUNS, *LEVELS_RUN])
def test_gradients_cross_the_processes_once_in_a_step(name, two_processes):
    for rank in two_processes[name]:
        assert rank["reductions"] == len(rank["gradients"])  # they fit one bucket


@pytest.mark.skipif(compiles_stale_graphs(), reason="torch_compile is refused with this torch and Python")
def test_two_processes_compile_each_subnetwork_once_and_train_as_uncompiled(tmp_path, two_processes):
    compiled = train_in_two_processes(tmp_path, COMPILED_RUN)["compiled"]
    for rank, uncompiled in zip(compiled, two_processes["levels"], strict=True):
        assert uncompiled["graphs"] == 0
        assert rank["reductions"] == len(rank["gradients"])
        assert rank["graphs"] == 1 + rank["subnets"] > 8  # torch.compile by itself stops at 8
        for found, expected in zip(rank["gradients"], uncompiled["gradients"], strict=True):
            assert_close(found, expected)
        assert_close(rank["weights"], uncompiled["weights"])


def test_with_batch_norm_each_process_normalises_its_half_and_gradients_are_averaged(two_processes):
    ranks = two_processes["halves"]
    parts = [list(zip(rank["batches"], rank["labels"], strict=True)) for rank in ranks]
    expected = train_by_hand(parts)
    for rank, statistics in zip(ranks, expected["statistics"], strict=True):
        for found, gradients in zip(rank["gradients"], expected["gradients"], strict=True):
            assert_close(found, gradients)
        assert_close(rank["weights"], expected["weights"] | statistics)
    assert not torch.equal(ranks[0]["weights"]["bn.running_mean"], ranks[1]["weights"]["bn.running_mean"])


def test_each_process_splits_its_own_images_by_the_same_positions(two_processes):
    ranks = two_processes["split"]
    assert ranks[0]["sampled"] == ranks[1]["sampled"]
    expected = train_by_hand([list(zip(rank["batches"], rank["labels"], strict=True)) for rank in ranks], split=True)
    for rank, statistics in zip(ranks, expected["statistics"], strict=True):
        for found, gradients in zip(rank["gradients"], expected["gradients"], strict=True):
            assert_close(found, gradients)
        assert_close(rank["weights"], expected["weights"] | statistics)


def test_synchronised_batch_norm_has_the_statistics_of_the_whole_batch_in_subnetworks_too(two_processes):
    ranks = two_processes["synchronised"]
    batches = [torch.cat(images) for images in zip(*(rank["batches"] for rank in ranks), strict=True)]
    labels = [torch.cat(labels) for labels in zip(*(rank["labels"] for rank in ranks), strict=True)]
    expected = train_by_hand([list(zip(batches, labels, strict=True))])
    for rank in ranks:
        for found, gradients in zip(rank["gradients"], expected["gradients"], strict=True):
            assert_close(found, gradients)
        assert_close(rank["weights"], expected["weights"] | expected["statistics"][0])


def train_by_hand(parts: Sequence[Sequence[tuple[Tensor, Tensor]]], split: bool = False) -> dict:
    """SGD with the average of the gradients of each part of the batch, by the formulas.

    Args:
        parts: the batches of each part, images (N, C, H, W) and labels (N,).
        split: whether each sub-network sees its own third of a process's images.
    """
    network = with_batchnorm()
    readers = [with_batchnorm() for _ in parts]  # whose full passes measure the statistics of each part
    sampler = SubnetSampler(3, 0.5, 1.0, [16, 12], seed=3, subnet_images="split" if split else 1.0)
    steps = []
    for step, batches in enumerate(list(zip(*parts, strict=True))[:STEPS]):
        subnets = sampler.sample(step)
        sampled = [(subnet.width, subnet.resolution) for subnet in subnets]
        seen = [subnet.part.indices(len(batches[0][0])) for subnet in subnets] if split else None
        found = [gradients_by_hand(network, images, labels, sampled, parts=seen)[1] for images, labels in batches]
        for reader, (images, _) in zip(readers, batches, strict=True):
            reader.load_state_dict(dict(network.named_parameters()), strict=False)
            reader(images)
        steps.append({name: sum(g[name] for g in found) / len(parts) for name in found[0]})
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter -= LEARNING_RATE * steps[-1][name]
    return {
        "gradients": steps,
        "weights": {name: parameter.detach() for name, parameter in network.named_parameters()},
        "statistics": [dict(reader.named_buffers()) for reader in readers],
    }


@pytest.mark.parametrize("name", ["both_accumulated", "mixed"])
def test_ranks_sample_the_same_subnetworks_and_transforms(name, two_processes):
    first, second = two_processes[name]
    for what in ("sampled", "turns", "computed"):
        assert first[what] == second[what]
    assert len(set(first["turns"])) > 1


def test_ranks_share_dropped_blocks_but_neither_images_nor_mixes(two_processes):
    ranks = two_processes["mixed"]
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


def mixed_share(batch: Tensor, mixed: Tensor) -> float:
    """How much of each image is left when every one is mixed with its neighbour."""
    neighbours = batch.roll(1, 0)
    difference = batch - neighbours
    share = ((mixed - neighbours) * difference).sum() / difference.square().sum()
    torch.testing.assert_close(mixed, share * batch + (1 - share) * neighbours, rtol=0, atol=1e-6)
    return share.item()


def write_run(folder: Path) -> None:
    network, flags, batch = EQUAL_TO_ONE_PROCESS["both_accumulated"]
    (folder / "runs.json").write_text(json.dumps({"run": (network, f"{flags} {batch}")}))


def test_a_process_that_dies_ends_the_other_with_an_error_within_a_minute(tmp_path, monkeypatch, capfd):
    """Without a launcher that watches both, as on two machines."""
    write_run(tmp_path)
    monkeypatch.setenv("DYING_RANK", "1")
    left, dying = start_ranks(lambda: train_runs(tmp_path))
    assert status_of(dying) == -9
    died = time.monotonic()
    assert status_of(left) == 1
    assert time.monotonic() - died < 60
    assert "RuntimeError" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_launch_with_an_error(tmp_path):
    write_run(tmp_path)
    launched = launch(str(tmp_path), DYING_RANK="1")
    assert launched.returncode == 1
    assert "exitcode  : -9" in launched.stderr
    assert time.time() - (tmp_path / "dying").stat().st_mtime < 60


@pytest.mark.slow
def test_two_machines_with_two_processes_each_train_like_one_process(tmp_path):
    """Two launches, as on two machines, by the file for two with eight each."""
    network, flags = "plain", f"{SETTINGS} --subnet_mode width+depth"
    (tmp_path / "runs.json").write_text(json.dumps({"run": (network, f"{flags} {QUARTER}")}))
    port = str(free_port())
    command = [*LAUNCH[:-1], "recipes/accelerate/gpu_2x8.yaml", "--num_processes", "4", "--main_process_port", port]
    machines = [
        subprocess.Popen(
            [*command, "--main_process_ip", "127.0.0.1", "--machine_rank", rank, SCRIPT, str(tmp_path)],
            cwd=ROOT,
            env=environment(),
        )
        for rank in ("0", "1")
    ]
    try:
        assert [machine.wait(timeout=500) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()
    ranks = [torch.load(tmp_path / f"run-rank{rank}.pt", weights_only=True) for rank in range(4)]
    assert [rank["processes"] for rank in ranks] == [4] * 4
    assert_equal_to_one_process(tmp_path / "alone", network, flags, ranks)


def train_with_deepspeed(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    script = [str(ROOT / "tests/helpers/train_with_deepspeed.py"), str(folder), *arguments]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2"])
def test_deepspeed_trains_as_distributed_data_parallel_does_and_refuses_several_backwards(tmp_path, stage):
    pytest.importorskip("deepspeed", reason="needs `pip install deepspeed` and a C++ compiler")
    weights = []
    for folder, arguments in ((tmp_path / "ddp", ()), (tmp_path / "deepspeed", (stage,))):
        trained = train_with_deepspeed(folder, "joint", *arguments)
        assert trained.returncode == 0, trained.stderr
        assert ("DeepSpeed" in trained.stdout + trained.stderr) == bool(arguments)
        weights.append(load_file(folder / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)
    refused = train_with_deepspeed(tmp_path / "refused", "sequential", stage)
    assert refused.returncode != 0
    assert 'DeepSpeed allows one backward in a step; set subnet_backward="joint"' in refused.stderr
