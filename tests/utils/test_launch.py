import os

import psutil
import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.utils.launch import LAUNCHERS, RANKS, meets_on_cpu, use_all_cores
from tests.helpers.residual_network import make_network


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*RANKS, "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch, flags: str, environment_of) -> None:
    """Give this process the environment that `accelerate launch` gives to those that it starts."""
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*flags.split(), "script.py"]))
    for name, value in environment_of(args).items():
        monkeypatch.setenv(name, value)


def on_cpu(args) -> dict[str, str]:
    return prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize("flags", ["--cpu --num_processes 2", "--cpu --num_processes 3 --num_machines 1"])
def test_a_process_that_was_to_be_one_of_several_does_not_train_alone(tmp_path, monkeypatch, flags):
    launched(monkeypatch, flags, on_cpu)
    with pytest.raises(ValueError, match="asked for several processes.*--config_file recipes/accelerate/cpu_2.yaml"):
        GradAugConfig(str(tmp_path), report_to="none")


@pytest.mark.parametrize("flags", ["--cpu", "--cpu --num_processes 1"])
def test_one_process_on_the_cpu_trains_alone(tmp_path, monkeypatch, flags):
    launched(monkeypatch, flags, on_cpu)
    assert GradAugConfig(str(tmp_path), report_to="none").world_size == 1


def test_a_process_that_mpi_started_is_not_alone(monkeypatch, tmp_path):
    launched(monkeypatch, "--cpu --num_processes 2", on_cpu)
    monkeypatch.setenv("PMI_RANK", "0")
    assert GradAugConfig(str(tmp_path), report_to="none", use_cpu=True).world_size == 1


@pytest.mark.parametrize(
    ("world_size", "accelerator", "expected"),
    [(None, False, False), ("1", False, False), ("2", False, True), ("2", True, False)],
)
def test_several_processes_meet_on_the_cpu_where_there_is_no_accelerator(
    monkeypatch, world_size, accelerator, expected
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert meets_on_cpu() == expected


SHARDED = {
    "FSDP": "--use_fsdp --fsdp_version 1 --num_processes 2",
    "FSDP2": "--use_fsdp --fsdp_version 2 --num_processes 2",
}


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp_of_accelerate_is_refused_on_one_process(tmp_path, monkeypatch, name):
    launched(monkeypatch, f"{SHARDED[name]} --main_process_port 0", prepare_multi_gpu_env)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    refused(tmp_path, "FSDP1 .*fsdp_version to 2" if name == "FSDP" else "accelerate divides no parameters")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("backward", ["sequential", "joint"])
def test_fsdp_of_the_trainer_is_refused_on_one_process(tmp_path, monkeypatch, version, backward):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # set by TrainingArguments
    message = "FSDP1 .*fsdp_version to 2" if version == 1 else "fsdp only works in distributed training"
    refused(tmp_path, message, fsdp=True, fsdp_config={"version": version}, subnet_backward=backward)


def refused(tmp_path, message: str, **settings) -> None:
    config = GradAugConfig(str(tmp_path), report_to="none", use_cpu=True, resolutions=[16, 12], **settings)
    rows = [{"pixel_values": torch.zeros(3, 16, 16), "labels": 0}] * 4
    with pytest.raises(ValueError, match=message):
        GradAugTrainer(make_network(), config, train_dataset=rows)


@pytest.mark.skipif(PartialState().device.type != "cpu", reason="cores are shared on machines without an accelerator")
@pytest.mark.parametrize(
    ("asked", "launched", "processes", "expected"),
    [
        (None, False, 1, 8),
        ("1", False, 1, 5),
        ("1", True, 1, 8),
        ("1", True, 4, 2),
        ("1", True, 16, 1),
        ("3", True, 1, 5),
    ],
)
def test_the_cores_are_shared_unless_a_number_of_threads_was_asked_for(
    monkeypatch, asked, launched, processes, expected
):
    torch.set_num_threads(5)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    for name in ("OMP_NUM_THREADS", *LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    use_all_cores()
    assert torch.get_num_threads() == expected
