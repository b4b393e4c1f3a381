"""What is written next to the weights, so that timm and transformers load the same folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from transformers import TimmWrapperForImageClassification

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


def timm_network(model: nn.Module) -> nn.Module | None:
    """The network built by `timm.create_model` that a model is or wraps, which timm can rebuild; None for others.

    Args:
        model: a timm network, a `TimmWrapperForImageClassification`, or any module.
    """
    network = model.timm_model if isinstance(model, TimmWrapperForImageClassification) else model
    built_by_timm = isinstance(getattr(network, "pretrained_cfg", None), dict) and hasattr(network, "num_features")
    return network if built_by_timm else None


def save_configs(network: nn.Module, folder: str | Path, label_names: Sequence[str] | None = None) -> None:
    """Write `config.json` and `preprocessor_config.json` next to the weights of a timm network.

    With the network's own state dict as `model.safetensors` the folder then loads in
    `timm.create_model("local-dir:FOLDER", pretrained=True)`, `AutoModelForImageClassification.from_pretrained(FOLDER)`
    and `pipeline("image-classification", model=FOLDER)`.

    Args:
        network: a network built by timm.
        folder: an existing folder.
        label_names: of the classes, in the order of the labels; None keeps those that the network came with.
    """
    file = Path(folder) / CONFIG
    save_config_for_hf(network, str(file), model_config={"label_names": list(label_names)} if label_names else None)
    config = json.loads(file.read_text())
    # timm reads the number of classes from the root too; transformers passes it beside these arguments.
    arguments = {name: value for name, value in config.pop("model_args", {}).items() if name != "num_classes"}
    config |= {
        "model_args": arguments,
        "model_type": "timm_wrapper",
        "architectures": [TimmWrapperForImageClassification.__name__],
    }
    file.write_text(json.dumps(config, indent=2) + "\n")
    processor = {
        "image_processor_type": "TimmWrapperImageProcessor",
        "architecture": config["architecture"],
        "pretrained_cfg": config["pretrained_cfg"],
    }
    (Path(folder) / PREPROCESSOR).write_text(json.dumps(processor, indent=2) + "\n")


def plain_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as safetensors stores it: contiguous tensors, none of which shares memory with another."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in state_dict.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return plain


def label_names(model: nn.Module, *datasets: Any) -> list[str] | None:
    """Names of a model's classes as its configuration or the first of some data sets has them, or None.

    Args:
        model: a transformers classifier with `config.id2label`, or any module.
        datasets: those of the `datasets` library whose `label` or `labels` is a `ClassLabel`; others are passed over.
    """
    names = getattr(getattr(model, "config", None), "id2label", None)
    if names and not all(name == f"LABEL_{label}" for label, name in names.items()):
        return [names[label] for label in sorted(names)]
    for dataset in datasets:
        features = getattr(dataset, "features", None) or {}
        for column in ("label", "labels"):
            if isinstance(features.get(column), ClassLabel):
                return features[column].names
    return None
