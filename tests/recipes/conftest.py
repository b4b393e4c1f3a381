import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset
from timm.models import build_model_with_cfg, register_model

from gradaug_hf.experiments.run import Recipe, run
from gradaug_hf.models.pyramidnet import PyramidNet

QUICK = (
    "--max_steps 2 --batch_size 8 --max_eval_samples 20 --eval_strategy no --save_strategy no --use_cpu "
    "--dataloader_num_workers 0 --per_device_eval_batch_size 20"
)
TRAINING_IMAGES = 100


@dataclass
class Finished:
    printed: str
    folder: Path

    @property
    def results(self) -> dict:
        return json.loads((self.folder / "results.json").read_text())

    @property
    def result(self) -> dict:
        (found,) = self.results["runs"]
        return found


@pytest.fixture(scope="session")
def few_images(real_data: Path, tmp_path_factory) -> str:
    """Folder with the first training and test images of CIFAR-10."""
    folder = tmp_path_factory.mktemp("few")
    for split, number in (("train", TRAINING_IMAGES), ("test", 40)):
        images = Dataset.from_parquet(str(real_data / "cifar10" / f"{split}.parquet"), cache_dir=str(folder / "cache"))
        images.take(number).to_parquet(folder / "data" / f"{split}.parquet")
    return str(folder / "data")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def small_pyramid() -> str:
    """Name of a pyramidal network of 8 layers in timm's registry."""

    @register_model
    def pyramidnet8_a12(pretrained: bool = False, **kwargs) -> PyramidNet:
        shape = {"depth": 8, "alpha": 12, "bottleneck": False}
        return build_model_with_cfg(PyramidNet, "pyramidnet8_a12", pretrained, **shape, **kwargs)

    return "pyramidnet8_a12"


@pytest.fixture
def run_recipe(few_images: str, tmp_path_factory, monkeypatch, capfd) -> Callable[..., Finished]:
    """Runs a recipe as its command line does, on few images and for two steps unless flags say otherwise."""

    def run_with(recipe: Recipe, flags: str) -> Finished:
        folder = tmp_path_factory.mktemp("out")
        line = f"recipe.py --dataset_name {few_images} --output_dir {folder} {QUICK} {flags}"
        monkeypatch.setattr(sys, "argv", line.split())
        monkeypatch.setattr(sys.modules["__main__"], "__file__", "recipe.py", raising=False)
        run(recipe)
        return Finished(capfd.readouterr().out, folder)

    return run_with
