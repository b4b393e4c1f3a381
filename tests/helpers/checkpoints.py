"""Small checkpoints and data sets in folders, for tests of what evaluates them."""

from pathlib import Path

import numpy as np
import PIL.Image
import timm
import torch
from safetensors.torch import save_file

from gradaug_hf.hub.configs import plain_state, save_configs


def save_network(folder: Path, seed: int, num_classes: int = 3, name: str = "resnet20_cifar") -> str:
    """A folder with a network that was sampled from a seed, and whose batch norm has seen images."""
    torch.manual_seed(seed)
    network = timm.create_model(name, num_classes=num_classes).train()
    with torch.no_grad():
        network(torch.randn(32, 3, 32, 32))
    folder.mkdir(parents=True)
    save_configs(network, folder)
    save_file(plain_state(network.state_dict()), folder / "model.safetensors")
    return str(folder)


def save_images(folder: Path, of_each_class: int, num_classes: int = 3, side: int = 32) -> str:
    """A folder of images sorted by class, with the splits train and test."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(num_classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(of_each_class):
                pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(place / f"{index}.png")
    return str(folder)
