import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, TimmWrapperConfig
from transformers import TimmWrapperForImageClassification as TimmWrapper

from gradaug_hf import GradAugConfig, GradAugTrainer
from gradaug_hf.hub import label_names, plain_state, save_configs, timm_network

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
# Loads folders with timm and with transformers, in a process that cannot import gradaug_hf.
LOAD = """
import sys
sys.modules["gradaug_hf"] = None
import timm, torch
from transformers import AutoModelForImageClassification
for folder in sys.argv[1:]:
    images = torch.load(folder + "/images.pt")
    with torch.no_grad():
        by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        by_transformers = AutoModelForImageClassification.from_pretrained(folder).eval()(images).logits
    torch.save([by_timm, by_transformers], folder + "/logits.pt")
"""
NAME_THE_PHOTO = """
import json, sys
sys.modules["gradaug_hf"] = None
from transformers import pipeline
print(json.dumps(pipeline("image-classification", model=sys.argv[1], device="cpu")(sys.argv[2])[0]))
"""


def run_elsewhere(code: str, *arguments: Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_timm_and_transformers_rebuild_networks_from_their_folders(tmp_path):
    torch.manual_seed(0)
    expected = {}
    for name, side, settings in (
        ("resnet18", 64, {"num_classes": 7}),
        ("test_efficientnet", 64, {"num_classes": 3, "in_chans": 1}),
        ("test_vit", 144, {"num_classes": 3, "global_pool": "avg", "dynamic_img_size": True}),
    ):
        network = timm.create_model(name, **settings).eval()
        folder = tmp_path / name
        folder.mkdir()
        safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        save_configs(network, folder)
        images = torch.randn(2, settings.get("in_chans", 3), side, side)
        torch.save(images, folder / "images.pt")
        with torch.no_grad():
            expected[folder] = network(images)
    run_elsewhere(LOAD, *expected)
    for folder, logits in expected.items():
        for found in torch.load(folder / "logits.pt"):
            assert torch.equal(found, logits), folder.name


def trained(model: nn.Module, folder: Path) -> GradAugTrainer:
    """A trainer after one step on random images with named labels."""
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 64, 64), "labels": label} for label in range(7)]
    config = GradAugConfig(
        str(folder), max_steps=1, num_subnets=1, resolutions=[64, 48], report_to="none", use_cpu=True, save_steps=1
    )
    trainer = GradAugTrainer(model, config, train_dataset=rows)
    trainer.train()
    return trainer


def wrapped() -> TimmWrapper:
    config = TimmWrapperConfig(architecture="test_resnet", id2label=dict(enumerate(NAMES)))
    return TimmWrapper(config)


def test_what_the_trainer_saves_loads_in_timm_and_transformers(tmp_path):
    images = torch.randn(2, 3, 64, 64)
    expected = {}
    for name, build in (("timm", lambda: timm.create_model("test_resnet", num_classes=7)), ("wrapper", wrapped)):
        trainer = trained(build(), tmp_path / name)
        model = trainer.model.eval()
        trainer.save_model()
        assert trainer.model is model
        for folder in (tmp_path / name, tmp_path / name / "checkpoint-1"):
            torch.save(images, folder / "images.pt")
            with torch.no_grad():
                expected[folder] = model(images)
    run_elsewhere(LOAD, *expected)
    for folder, output in expected.items():
        for logits in torch.load(folder / "logits.pt"):
            assert torch.equal(logits, getattr(output, "logits", output)), folder


def test_pipeline_names_the_class_of_a_photo_as_the_trained_network_does(tmp_path, real_data):
    photos = Dataset.from_parquet(str(next((real_data / "hymenoptera").rglob("*.parquet"))))
    photo = photos[0]["image"].convert("RGB")
    photo.save(tmp_path / "photo.png")
    trainer = trained(wrapped(), tmp_path)
    trainer.save_model()
    network = trainer.model.timm_model.eval()
    pixels = create_transform(**resolve_model_data_config(network))(Image.open(tmp_path / "photo.png"))[None]
    best = json.loads(run_elsewhere(NAME_THE_PHOTO, tmp_path, tmp_path / "photo.png"))
    with torch.no_grad():
        score, label = network(pixels).softmax(1).max(1)
    assert best["label"] == NAMES[label]
    assert best["score"] == pytest.approx(score.item(), abs=1e-6)


def test_training_goes_on_from_a_checkpoint_of_a_wrapped_network(tmp_path):
    weights = trained(wrapped(), tmp_path).model.state_dict()
    again = trained(wrapped(), tmp_path / "other")
    again._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.model.state_dict().items())


def test_only_networks_that_timm_built_are_timm_networks():
    network = timm.create_model("test_resnet")
    assert timm_network(network) is network
    model = wrapped()
    assert timm_network(model) is model.timm_model
    assert timm_network(nn.Linear(2, 2)) is None
    assert timm_network(ResNetForImageClassification(ResNetConfig(depths=[1], hidden_sizes=[8], num_labels=2))) is None


def test_tensors_that_share_memory_or_are_not_contiguous_are_stored_one_by_one(tmp_path):
    matrix = torch.randn(3, 4)
    state = {"a": matrix, "tied": matrix, "turned": matrix.t(), "row": matrix[1]}
    safetensors.torch.save_file(plain_state(state), tmp_path / "x.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_class_names_come_from_the_configuration_or_else_from_the_data():
    features = Features({"label": ClassLabel(names=NAMES)})
    data = Dataset.from_dict({"label": [0, 1]}, features=features)
    network = timm.create_model("test_resnet")
    assert label_names(wrapped()) == NAMES
    assert label_names(network, None, data) == NAMES
    assert label_names(network, [1, 2]) is None
