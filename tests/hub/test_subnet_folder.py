import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from gradaug_hf import extract_subnet, make_slimmable, recalibrate_batchnorm
from gradaug_hf.hub.subnet_folder import save_subnet

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
# Loads folders by the code that their README shows.
LOAD = """
import re, sys
import torch
for folder in sys.argv[1:]:
    readme = open(folder + "/README.md").read()
    code = re.search("```python(.*?)```", readme, re.DOTALL)[1].replace("FOLDER", folder)
    found = {}
    exec(code, found)
    images = torch.load(folder + "/images.pt")
    with torch.no_grad():
        torch.save(found["model"](images), folder + "/logits.pt")
"""


def slimmable(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return make_slimmable(network.eval())


def resnet_of_transformers() -> nn.Module:
    names = dict(enumerate(NAMES))
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names)
    return ResNetForImageClassification(config)


def wrapper(folder: Path) -> nn.Module:
    """Return a wrapper with statistics of its own."""
    cfg = {"mean": MEAN, "std": STD, "label_names": NAMES}
    network = timm.create_model("test_convnext", num_classes=7, pretrained_cfg_overlay=cfg)
    timm.models.save_for_hf(network, folder, model_config={"label_names": NAMES}, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]  # which transformers cannot read
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForImageClassification.from_pretrained(folder)


def test_subnets_load_where_gradaug_hf_is_not_installed(tmp_path, elsewhere):
    models = {
        "convnext": timm.create_model("test_convnext", num_classes=7),
        "wrapper": wrapper(tmp_path / "source"),
        "resnet": timm.create_model("test_resnet", num_classes=7),
        "efficientnet": timm.create_model("test_efficientnet", num_classes=7),
        "own": timm.create_model("resnet20_cifar", num_classes=7),
        "resnet_of_transformers": resnet_of_transformers(),
    }
    expected = {}
    for name, network in models.items():
        model, folder = slimmable(network), tmp_path / name
        images = torch.randn(5, 3, 64, 64)
        with recalibrate_batchnorm(model, 0.75, [images]):
            save_subnet(model, 0.75, folder, input_size=64, label_names=NAMES)
            subnet = extract_subnet(model, 0.75).eval()
        assert subnet.state_dict().keys() == network.state_dict().keys()
        torch.save(images, folder / "images.pt")
        with torch.no_grad():
            output = subnet(images)
        expected[folder] = getattr(output, "logits", output)
        config = json.loads((folder / "config.json").read_text())
        assert config["subnet"]["width"] == 0.75
        assert config["label_names"] == NAMES
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        assert sum(t.numel() for t in weights.values()) == sum(t.numel() for t in subnet.state_dict().values())
    elsewhere.run(LOAD, *expected)
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt"), logits), folder
    config = json.loads((tmp_path / "wrapper" / "config.json").read_text())
    assert tuple(config["data_config"]["mean"]) == MEAN


def test_a_program_says_what_images_it_takes(tmp_path):
    processor = ViTImageProcessor(size={"height": 48, "width": 48}, image_mean=MEAN, image_std=STD)
    model = slimmable(timm.create_model("test_efficientnet", num_classes=7))
    save_subnet(model, 0.5, tmp_path / "program", processor=processor)
    config = json.loads((tmp_path / "program" / "config.json").read_text())
    assert config["input_size"] == [3, 48, 48]
    assert config["data_config"]["mean"] == list(MEAN)
    assert "model(torch.randn(1, 3, 48, 48))" in (tmp_path / "program" / "README.md").read_text()
    with pytest.raises(ValueError, match="[Uu]nrecognized model"):  # no library takes it for a whole network
        AutoModelForImageClassification.from_pretrained(tmp_path / "program")


def test_a_training_goes_on_with_the_random_numbers_that_it_would_have_had(tmp_path):
    model = slimmable(timm.create_model("test_resnet", num_classes=7))
    state = torch.get_rng_state()
    save_subnet(model, 0.5, tmp_path / "narrow", input_size=64)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_that_is_taken_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists already; a new or an empty folder is accepted"):
        save_subnet(nn.Linear(1, 1), 0.75, tmp_path)


def test_nothing_is_left_of_a_subnet_that_cannot_be_written(tmp_path):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.fc = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(self.conv(x).mean((2, 3)))
            return x if x.device.type == "meta" or x.sum() > 0 else -x

    model = make_slimmable(Branching(), input_size=16)
    with pytest.raises(ValueError, match="torch.export cannot write a sub-network of Branching"):
        save_subnet(model, 0.75, tmp_path / "out", input_size=16)
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_subnet_is_pushed_and_pulled(hub, tmp_path):
    model = slimmable(timm.create_model("test_efficientnet", num_classes=3))
    save_subnet(model, 0.75, tmp_path / "narrow", input_size=64)
    api = HfApi()
    api.create_repo("me/narrow")
    api.upload_folder(repo_id="me/narrow", folder_path=tmp_path / "narrow")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pulled = torch.export.load(api.hf_hub_download("me/narrow", "model.pt2")).module()
        torch.testing.assert_close(pulled(images), extract_subnet(model, 0.75)(images), rtol=1e-4, atol=1e-5)
