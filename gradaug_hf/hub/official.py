"""Weights that the paper's own code trained become a checkpoint folder of timm.

A ResNet-110 becomes the model that was trained: the paper's code multiplies the residuals by their survival
probability when it tests, although its full network never drops a block while training.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import gradaug_hf.models  # noqa: F401  (registers the paper's networks in timm)
from gradaug_hf.hub.configs import save_configs
from gradaug_hf.hub.folders import check_new, new_folder
from gradaug_hf.hub.weights import check_finite, read_pickle

WRAPPED = "module."
# The transform that the paper's code tests with, which is not the one of timm's own ResNet-50 weights.
IMAGENET_CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "fc",
}


def _resnet50_name(name: str) -> str:
    """Return the name in a ResNet whose blocks follow each other behind the stem, each with a sequence of layers."""
    first_blocks = (1, 4, 8, 14)
    name = re.sub(r"^conv1", "features.0.0", name)
    name = re.sub(r"^bn1", "features.0.1", name)
    name = re.sub(r"^layer(\d)\.(\d+)", lambda at: f"features.{first_blocks[int(at[1]) - 1] + int(at[2])}", name)
    name = re.sub(r"conv(\d)", lambda at: f"body.{3 * int(at[1]) - 3}", name)
    name = re.sub(r"bn(\d)", lambda at: f"body.{3 * int(at[1]) - 2}", name)
    return re.sub(r"^fc", "classifier.0", name.replace("downsample", "shortcut"))


def _wide_resnet_name(name: str) -> str:
    name = re.sub(r"^layer(\d)", r"block\1.layer", name)
    return re.sub(r"^bn\.", "bn1.", name).replace("shortcut", "convShortcut")


def _pyramidnet_name(name: str) -> str:
    return re.sub(r"^bn\.", "bn_final.", name)


# How the paper's code names a tensor of the model in timm.
OFFICIAL_NAMES: dict[str, Callable[[str], str]] = {
    "resnet50": _resnet50_name,
    "wrn28_10": _wide_resnet_name,
    "pyramidnet200_a240": _pyramidnet_name,
    "resnet110_cifar": str,
}


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without the prefix that DataParallel gives the names.

    Args:
        file: a checkpoint of PyTorch; the tensors are its entry `state_dict` or `model`, or all of it.

    Raises:
        ValueError: the file cannot be read, needs more than tensors and plain values, holds no tensors by name, or
            holds NaN or infinite ones.
    """
    weights = _find_weights(read_pickle(file, map_location="cpu"))
    if weights is None:
        raise ValueError(
            f"{file} holds no tensors by name; a state dict is accepted, by itself or as the entry 'state_dict' or "
            "'model' of a dict"
        )
    check_finite(weights, file)
    return {name.removeprefix(WRAPPED): tensor for name, tensor in weights.items()}


def _find_weights(checkpoint: Any) -> dict[str, Tensor] | None:
    if not isinstance(checkpoint, dict):
        return None
    weights = next((checkpoint[key] for key in ("state_dict", "model") if key in checkpoint), checkpoint)
    named = isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())
    return weights if weights and named else None


def convert(weights: dict[str, Tensor], arch: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the timm model that a checkpoint of the paper's code belongs to, and its state dict.

    Args:
        weights: tensors by the names that the paper's code gives them; the classifier says how many classes there are.
        arch: name of the model in timm, one of `OFFICIAL_NAMES`.

    Returns:
        The model on the meta device, and its tensors by timm's names.

    Raises:
        ValueError: tensors are missing, left over, or of another shape; names them all.
    """
    official_name = OFFICIAL_NAMES[arch]
    classifier = weights.get(official_name("fc.weight"))
    num_classes = len(classifier) if classifier is not None and classifier.ndim == 2 else 0
    cfg = {"pretrained_cfg": IMAGENET_CFG} if arch == "resnet50" else {}
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=num_classes or None, **cfg)
    expected = model.state_dict()
    official = {official_name(name): name for name in expected}
    problems = [f"missing: {name}" for name in official if name not in weights]
    problems += [f"extra: {name}" for name in weights if name not in official]
    for name, own_name in official.items():
        if name in weights and weights[name].shape != expected[own_name].shape:
            shapes = tuple(weights[name].shape), tuple(expected[own_name].shape)
            problems.append(f"mis-shaped: {name} is {shapes[0]} instead of {shapes[1]}")
    if problems:
        raise ValueError("\n  ".join([f"these are not the weights of a {arch} of the paper's code:", *problems]))
    state = {
        own_name: weights[name].to(expected[own_name].dtype).clone(memory_format=torch.contiguous_format)
        for name, own_name in official.items()
    }
    return model, state


def convert_file(file: Path, arch: str, output: Path) -> nn.Module:
    """Write the folder of a checkpoint of the paper's code, whole or not at all; return its model, on meta tensors.

    Raises:
        ValueError: the file cannot be read or does not fit, or the folder is taken or cannot be written.
    """
    check_new(output)
    model, state = convert(read_weights(file), arch)
    with new_folder(output) as folder:
        save_configs(model, folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model
