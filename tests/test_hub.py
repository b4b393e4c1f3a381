import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

from gradaug_hf.hub import is_timm_network, save_timm_config


@pytest.mark.parametrize(
    "name, settings",
    [
        ("resnet18", {"num_classes": 7}),
        ("test_efficientnet", {"num_classes": 3, "in_chans": 1}),
        ("test_vit", {"num_classes": 3, "global_pool": "avg"}),
    ],
)
def test_timm_rebuilds_the_network_from_its_folder(tmp_path, name, settings):
    torch.manual_seed(0)
    network = timm.create_model(name, **settings).eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    save_timm_config(network, tmp_path)
    images = torch.randn(2, settings.get("in_chans", 3), *network.pretrained_cfg["input_size"][1:])
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, timm\n"
        f"model = timm.create_model('local-dir:{tmp_path}', pretrained=True).eval()\n"
        f"with torch.no_grad(): torch.save(model(torch.load('{tmp_path}/images.pt')), '{tmp_path}/logits.pt')\n"
        "assert 'gradaug_hf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), network(images))


def test_only_networks_that_timm_built_are_timm_networks():
    assert is_timm_network(timm.create_model("test_resnet"))
    assert not is_timm_network(torch.nn.Linear(2, 2))
