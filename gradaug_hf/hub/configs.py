"""What is written next to the weights, so that timm and transformers load the same folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from timm.models._input import get_model_args, get_model_input_config
from timm.models._pretrained import filter_pretrained_cfg
from torch import Tensor, nn
from transformers import TimmWrapperForImageClassification
from transformers.image_processing_utils import BaseImageProcessor

from gradaug_hf.hub.preprocessing import processor_data_config

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# What a configuration says about classes is written from the network and the names of its classes instead.
CLASSES = ("num_classes", "label_names", "label_descriptions", "label_offset")


def timm_network(model: nn.Module) -> nn.Module | None:
    """The network built by `timm.create_model` that a model is or wraps; None for others.

    Args:
        model: a timm network, a `TimmWrapperForImageClassification`, or any module.
    """
    network = model.timm_model if isinstance(model, TimmWrapperForImageClassification) else model
    built_by_timm = isinstance(getattr(network, "pretrained_cfg", None), dict) and hasattr(network, "num_features")
    return network if built_by_timm else None


def why_not_rebuilt(network: nn.Module) -> str | None:
    """Why `timm.create_model` does not make a network again from what `config.json` can hold; None where it does.

    Args:
        network: one for which `timm_network` is not None; changed since it was built, perhaps.
    """
    arguments = get_model_args(network)
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            return f"its argument {name} is {value!r}, which JSON cannot hold (timm takes layers by their name, too)"
    try:
        with torch.device("meta"):
            again = timm.create_model(network.pretrained_cfg["architecture"], **arguments)
    except Exception as error:  # timm's constructors raise errors of many kinds
        return f"timm.create_model fails with {arguments}: {error}"
    expected, found = tensor_shapes(network), tensor_shapes(again)
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if not different:
        return None
    name = different[0]
    return (
        f"timm.create_model gives {name} the shape {found.get(name)} instead of {expected.get(name)}; "
        f"{len(different)} tensors differ"
    )


def tensor_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def save_configs(
    model: nn.Module,
    folder: str | Path,
    label_names: Sequence[str] | None = None,
    processor: BaseImageProcessor | None = None,
) -> None:
    """Write `config.json` and `preprocessor_config.json` next to the weights of a timm network.

    With the network's own state dict as `model.safetensors` the folder then loads in
    `timm.create_model("local-dir:FOLDER", pretrained=True)`, `AutoModelForImageClassification.from_pretrained(FOLDER)`
    and `pipeline("image-classification", model=FOLDER)`.

    Args:
        model: a network built by timm, or a `TimmWrapperForImageClassification` of one.
        folder: an existing folder.
        label_names: of the classes, in the order of the labels; None keeps those that the network came with.
        processor: what prepares the images; None keeps what the network came with.
    """
    network = timm_network(model)
    file = Path(folder) / CONFIG
    save_config_for_hf(
        network,
        str(file),
        model_config={"pretrained_cfg": wrapper_cfg(model)},
        data_config=_data_config(network, processor),
    )
    config = json.loads(file.read_text())
    pretrained_cfg = config["pretrained_cfg"]
    own = {name: pretrained_cfg.pop(name, None) for name in CLASSES}
    names = label_names or _as_list(own["label_names"])
    if names and len(names) == network.num_classes:
        config["label_names"] = list(names)
        if own["label_descriptions"] and config["label_names"] == _as_list(own["label_names"]):
            config["label_descriptions"] = own["label_descriptions"]
    # timm reads the number of classes from the root too; transformers passes it beside these arguments.
    arguments = {name: value for name, value in config.pop("model_args", {}).items() if name != "num_classes"}
    config |= {
        "model_args": arguments,
        "model_type": "timm_wrapper",
        "architectures": [TimmWrapperForImageClassification.__name__],
    }
    _write_json(file, config)
    _write_json(
        Path(folder) / PREPROCESSOR,
        {
            "image_processor_type": "TimmWrapperImageProcessor",
            "architecture": config["architecture"],
            "pretrained_cfg": pretrained_cfg,
        },
    )


def wrapper_cfg(model: nn.Module) -> dict[str, Any]:
    """What the folder that a wrapper came from says, of which its network knows nothing."""
    config = getattr(getattr(model, "config", None), "pretrained_cfg", None) or {}
    config = filter_pretrained_cfg(config, remove_source=True)
    return {name: value for name, value in config.items() if name not in (*CLASSES, "architecture")}


def _data_config(network: nn.Module, processor: BaseImageProcessor | None) -> dict[str, Any]:
    """What a processor does, as far as it can be said of the network's input."""
    if processor is None:
        return {}
    config = processor_data_config(processor)
    own = get_model_input_config(network)
    channels, *size = own["input_size"]
    if "input_size" in config:
        asked = config["input_size"][1:]
        config["input_size"] = (channels, *(size if own["fixed_input_size"] else asked))
    return {k: v for k, v in config.items() if k not in ("mean", "std") or len(v) in (1, channels)}


def _as_list(names: Any) -> list[str]:
    return list(names.values() if isinstance(names, Mapping) else names or ())


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        datasets: those of the `datasets` library whose `label` or `labels` is a `ClassLabel`, and those with `classes`
            as torchvision's have; others are passed over.
    """
    names = getattr(getattr(model, "config", None), "id2label", None)
    if names and not all(name == f"LABEL_{label}" for label, name in names.items()):
        return [names[label] for label in sorted(names)]
    for dataset in datasets:
        features = getattr(dataset, "features", None) or {}
        for column in ("label", "labels"):
            if names := getattr(features.get(column), "names", None):  # a ClassLabel
                return names
        classes = getattr(dataset, "classes", None)
        if isinstance(classes, Sequence) and all(isinstance(name, str) for name in classes):
            return list(classes)
    return None
