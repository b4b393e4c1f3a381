import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).parents[2]
LINES = [
    line.removeprefix("accelerate launch ").replace("HOST", "10.0.0.1")
    for line in (ROOT / "docs/distributed.md").read_text().splitlines()
    if line.startswith("accelerate launch --config_file recipes/accelerate/")
]
# Machines, processes on each, and whether they start through the launcher of several GPUs.
EXPECTED = {
    "cpu_2.yaml": (1, 2, True),
    "gpu_1.yaml": (1, 1, False),
    "gpu_8.yaml": (1, 8, True),
    "gpu_2x8.yaml": (2, 8, True),
    "fsdp2.yaml": (1, 8, False),  # through the same launcher, by another flag
}


def parsed(line: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(shlex.split(line)))
    return args


def test_the_page_launches_with_each_file():
    files = {path.name for path in (ROOT / "recipes/accelerate").iterdir()}
    assert files == set(EXPECTED) == {Path(shlex.split(line)[1]).name for line in LINES}
    assert len(LINES) == len(files) + 1  # one on each of two machines


@pytest.mark.parametrize("line", LINES)
def test_accelerate_understands_the_line(line, monkeypatch):
    args = parsed(line, monkeypatch)
    machines, processes, several = EXPECTED[Path(args.config_file).name]
    assert (args.num_machines, args.num_processes, bool(args.multi_gpu)) == (machines, machines * processes, several)
    assert args.use_fsdp == ("fsdp" in line)
    assert not args.cpu
    assert args.mixed_precision == "no"
    assert (ROOT / args.training_script).is_file()


def test_each_of_two_machines_starts_eight_processes_and_meets_the_other(monkeypatch):
    lines = [line for line in LINES if "gpu_2x8" in line]
    found = [parsed(line, monkeypatch) for line in lines]
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    for rank, args in enumerate(found):
        prepare_multi_gpu_env(args)
        assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", rank)
        assert args.rdzv_endpoint == "10.0.0.1:29500"


def launched(words: list[str], flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, "recipes/cifar_wideresnet.py", *flags.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1000,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--num_train_epochs 0", "error: num_train_epochs is 0.0; it must be above 0"),
        ("--nm_subnets 2", "error: --nm_subnets is no flag; near it: --num_subnets"),
    ],
)
def test_launched_in_two_processes_the_last_words_are_those_of_the_recipe(flags, line):
    done = launched(["--config_file", "recipes/accelerate/cpu_2.yaml"], flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2] == f"  traceback : {line}"  # a ruled line follows


@pytest.mark.slow
def test_launched_quietly_in_one_process_a_recipe_ends_with_its_own_line():
    done = launched(["--quiet", "--cpu", "--num_processes", "1"], "--num_train_epochs 0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: num_train_epochs is 0.0; it must be above 0"
    assert "Traceback" not in done.stderr
