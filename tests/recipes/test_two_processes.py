"""Recipes in two processes on the CPU, by the command line of the README."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from tests.recipes.conftest import QUICK

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu_2.yaml"]
NETWORKS = {
    "cifar_wideresnet": "resnet20_cifar",
    "cifar_resnet110_depth": "resnet20_cifar",
    "cifar_pyramidnet": "pyramidnet110_a48",
    "imagenet_resnet50": "test_resnet",
}


def launch(script: str, flags: str) -> str:
    """What a recipe printed."""
    done = subprocess.run(
        [*LAUNCH, "--main_process_port", "0", f"recipes/{script}.py", *flags.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name", [name if name == "cifar_wideresnet" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_recipe_trains_in_two_processes_that_share_a_batch(name, few_images, tmp_path):
    flags = f"--model {NETWORKS[name]} --dataset_name {few_images} --output_dir {tmp_path / 'out'} {QUICK}"
    printed = launch(name, f"{flags} --sync_batchnorm --max_train_samples 16 --max_steps -1 --num_train_epochs 2")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (run,) = results["runs"]
    assert run["steps"] == 4  # two epochs of 16 images, of which each process has four in a step
    assert results["settings"]["per_device_train_batch_size"] == 4
    assert printed.count(f"wrote the model and results.json to {tmp_path / 'out'}") == 1
    trained = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert all(parameter.isfinite().all() for parameter in trained.parameters())


@pytest.mark.slow
def test_quickstart_trains_in_two_processes(tmp_path):
    options = "--labels_per_class 1 --epochs 1 --batch_size 5 --max_eval_samples 60"
    printed = launch("quickstart", f"{options} --output_dir {tmp_path}")
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["method"], run["steps"]) for run in runs] == [("plain", 1), ("gradaug", 1)]
    assert printed.count("| gradaug ") == 1
    assert printed.count("in a new process: top-1") == 1
