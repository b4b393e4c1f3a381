"""Recipes in two processes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from gradaug_hf.cli import main
from gradaug_hf.experiments.recipes import CIFAR_WIDERESNET
from gradaug_hf.experiments.run import run
from tests.helpers.checkpoints import save_images, save_network
from tests.helpers.small_training import start_ranks, status_of
from tests.recipes.conftest import QUICK

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu_2.yaml"]
NETWORKS = {
    "cifar_wideresnet": "wrn10_2",
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_recipe_trains_in_two_launched_processes_that_share_a_batch(name, few_images, tmp_path):
    printed = launch(name, sharing(name, few_images, tmp_path / "out"))
    assert_shared(printed, tmp_path / "out")


def test_recipe_trains_in_two_processes_that_share_a_batch(few_images, tmp_path, monkeypatch, capfd):
    flags = sharing("cifar_wideresnet", few_images, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["cifar_wideresnet.py", *flags.split()])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "cifar_wideresnet.py", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 2)  # a thread for each: others are lost in a fork

    def train() -> None:
        run(CIFAR_WIDERESNET)
        sys.stdout.flush()  # forks end without

    assert [status_of(rank) for rank in start_ranks(train)] == [0, 0]
    assert_shared(capfd.readouterr().out, tmp_path / "out")


def sharing(name: str, images: str, folder: Path) -> str:
    """Flags of two epochs of 16 images, of which each process has four in a step."""
    return (
        f"--model {NETWORKS[name]} --dataset_name {images} --output_dir {folder} {QUICK} --sync_batchnorm "
        "--max_train_samples 16 --max_steps -1 --num_train_epochs 2 --num_subnets 1"
    )


def assert_shared(printed: str, folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    (record,) = results["runs"]
    assert record["steps"] == 4
    assert results["settings"]["per_device_train_batch_size"] == 4
    assert printed.count(f"wrote the model and results.json to {folder}") == 1
    trained = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(parameter.isfinite().all() for parameter in trained.parameters())


@pytest.mark.slow
def test_quickstart_trains_in_two_processes(tmp_path):
    options = "--labels_per_class 1 --epochs 2 --batch_size 5 --max_eval_samples 60 --seeds 0"
    printed = launch("quickstart", f"{options} --output_dir {tmp_path}")
    runs = json.loads((tmp_path / "summary.json").read_text())
    assert [(run["row"], run["steps"]) for run in runs] == [("plain", 2), ("plain, 3 epochs", 3), ("gradaug", 2)]
    assert printed.count("| gradaug  ") == 1
    assert printed.count("in a new process: top-1") == 1


@pytest.mark.slow
def test_fine_tuning_in_two_processes_is_that_of_one(tmp_path, monkeypatch, capsys):
    photos = save_images(tmp_path / "photos", 8, num_classes=2)
    for file in sorted((tmp_path / "photos" / "train" / "class1").iterdir())[:4]:
        file.unlink()  # 12 are left, of which the classes have weights 0.75 and 1.5
    flags = (
        f"--model {save_network(tmp_path / 'vit', 0, 5, 'test_vit')} --dataset_name {photos} --image_size 32 "
        "--batch_size 4 --num_train_epochs 2 --optim sgd --learning_rate 0.1 --ema_decay 0.5 --class_weights balanced "
        "--use_cpu --dataloader_num_workers 0 --resolutions 32 16 --min_width 0.5 --output_dir"
    )
    printed = launch("fine_tune", f"{flags} {tmp_path / 'two'}")
    assert printed.count("wrote the model and results.json") == printed.count("wrote classes.csv") == 1
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "fine_tune.py", raising=False)
    main(["fine-tune", *flags.split(), str(tmp_path / "one")])
    for file in ("model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-6/ema.safetensors"):
        found, expected = (load_file(tmp_path / run / file) for run in ("two", "one"))
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    averaged, trained = (
        load_file(tmp_path / "two" / file) for file in ("model.safetensors", "checkpoint-6/model.safetensors")
    )
    assert not torch.equal(averaged["head.weight"], trained["head.weight"])
    runs = {run: json.loads((tmp_path / run / "results.json").read_text())["runs"][0] for run in ("one", "two")}
    assert runs["one"]["top1"] == runs["two"]["top1"] and runs["two"]["steps"] == 6
    assert (tmp_path / "one" / "classes.csv").read_text() == (tmp_path / "two" / "classes.csv").read_text()
