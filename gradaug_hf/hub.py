"""What is written next to the weights, so that others can load them."""

from pathlib import Path

from timm.models._hub import save_config_for_hf
from torch import nn


def is_timm_network(model: nn.Module) -> bool:
    """Whether a module was built by `timm.create_model`, so that timm can describe and rebuild it."""
    return isinstance(getattr(model, "pretrained_cfg", None), dict) and hasattr(model, "num_features")


def save_timm_config(model: nn.Module, folder: str | Path) -> None:
    """Write `config.json`, with which `timm.create_model("local-dir:FOLDER", pretrained=True)` rebuilds the network.

    Args:
        model: a network built by timm; the folder holds its weights as `model.safetensors`.
        folder: an existing folder.
    """
    save_config_for_hf(model, str(Path(folder) / "config.json"))
