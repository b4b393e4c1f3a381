"""The configuration files next to the weights, so that timm and transformers load the same folder."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from timm.models._input import get_model_args, get_model_input_config
from timm.models._pretrained import filter_pretrained_cfg
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification
from transformers.image_processing_utils import BaseImageProcessor

from gradaug_hf.hub.preprocessing import processor_data_config
from gradaug_hf.hub.weights import CONFIG

PREPROCESSOR = "preprocessor_config.json"
# Fields about classes, which are written from the model and the names of its classes instead.
CLASSES = ("num_classes", "label_names", "label_descriptions", "label_offset")


def timm_network(model: nn.Module) -> nn.Module | None:
    """Return the model of `timm.create_model` that a model is or, as `TimmWrapper...`, wraps; None for others."""
    network = model.timm_model if isinstance(model, TimmWrapperForImageClassification) else model
    built_by_timm = isinstance(getattr(network, "pretrained_cfg", None), dict) and hasattr(network, "num_features")
    return network if built_by_timm else None


def why_not_rebuilt(network: nn.Module) -> str | None:
    """Return the reason why `timm.create_model` cannot build a timm model again from `config.json`, or None."""
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
    expected, found = (
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (network, again)
    )
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if not different:
        return None
    name = different[0]
    return (
        f"timm.create_model gives {name} the shape {found.get(name)} instead of {expected.get(name)}; "
        f"{len(different)} tensors differ"
    )


def warn_of_weights_alone(model: nn.Module) -> None:
    """Warn if `timm.create_model` cannot build the timm model again that a model is or wraps."""
    network = timm_network(model)
    reason = None if network is None else why_not_rebuilt(network)
    if reason is not None:
        name = type(network).__name__
        warnings.warn(f"the folder of this {name} will have its weights alone: {reason}", stacklevel=3)


def save_configs(
    model: nn.Module,
    folder: str | Path,
    label_names: Sequence[str] | None = None,
    processor: BaseImageProcessor | None = None,
    problem_type: str | None = None,
) -> None:
    """Write `config.json` and `preprocessor_config.json` next to the weights of a timm model.

    With the timm model's own state dict as `model.safetensors` the folder then loads in
    `timm.create_model("local-dir:FOLDER", pretrained=True)`, `AutoModelForImageClassification.from_pretrained(FOLDER)`
    and `pipeline("image-classification", model=FOLDER)`.

    Args:
        model: built by timm, or a `TimmWrapperForImageClassification` of such a model.
        folder: an existing folder.
        label_names: of the classes, in the order of the labels; None keeps those that the model came with.
        processor: prepares the images; None keeps the preparation that the model came with.
        problem_type: of transformers, from which a pipeline knows whether an image has one class or several; None:
            that of the model's config.
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
    problem_type = problem_type or getattr(getattr(model, "config", None), "problem_type", None)
    if problem_type is not None:
        config["problem_type"] = problem_type
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
    """Return the entries that the checkpoint of a wrapper has but its timm model lacks."""
    config = getattr(getattr(model, "config", None), "pretrained_cfg", None) or {}
    config = filter_pretrained_cfg(config, remove_source=True)
    return {name: value for name, value in config.items() if name not in (*CLASSES, "architecture")}


def _data_config(network: nn.Module, processor: BaseImageProcessor | None) -> dict[str, Any]:
    """Return the data config of a processor, as far as it fits the model's input."""
    if processor is None:
        return {}
    config = processor_data_config(processor)
    own = get_model_input_config(network)
    channels, *size = own["input_size"]
    if "input_size" in config:
        asked = config["input_size"][1:]
        config["input_size"] = (channels, *(size if own["fixed_input_size"] else asked))
    return {k: v for k, v in config.items() if k not in ("mean", "std") or len(v) in (1, channels)}


def warn_of_other_size(model: nn.Module, processor: BaseImageProcessor | None, size: Sequence[int]) -> None:
    """Warn if a pipeline will prepare images of another size than those that a model was evaluated on.

    Args:
        model: the model that is saved.
        processor: prepares the images; None keeps the preparation that the model came with.
        size: height and width of the images that were evaluated, in pixels.
    """
    network = timm_network(model)
    if network is not None:
        config = {**get_model_input_config(network), **wrapper_cfg(model), **_data_config(network, processor)}
    else:
        config = {} if processor is None else processor_data_config(processor)
    prepared = tuple(config.get("input_size", (3, *size))[1:])
    if prepared != tuple(size):
        warnings.warn(
            f"images of {size[0]} x {size[1]} pixels were evaluated, but {PREPROCESSOR} will have {prepared[0]} x "
            f"{prepared[1]}: give the trainer the image processor of the evaluation as processing_class",
            stacklevel=2,
        )


def warn_of_no_processor(model: nn.Module, processor: BaseImageProcessor | None) -> None:
    """Warn if a model of transformers is saved without an image processor."""
    if isinstance(model, PreTrainedModel) and processor is None:
        warnings.warn(
            f"no {PREPROCESSOR} is written, which a pipeline needs: give GradAugTrainer the image processor as "
            "processing_class",
            stacklevel=2,
        )


def check_class_names(model: nn.Module, class_names: Sequence[str], source: str) -> None:
    """Make sure that the labels of a dataset stand for the classes that a trained model knows by them.

    Args:
        model: as it was loaded, with the classifier of its checkpoint; one that names no classes is passed over.
        class_names: of the dataset, in the order of the labels, as many as the model has; other names than the model's
            are warned of, since they may be other words for the same classes.
        source: where the model is from.

    Raises:
        ValueError: they are the same names in another order.
    """
    stated = stated_names(model)
    if stated is None or list(class_names) == stated or len(stated) != len(class_names):
        return
    pairs = enumerate(zip(stated, class_names, strict=True))
    label, (known, name) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
    difference = f"class {label} is {known!r} for the model {source!r}, and {name!r} in the dataset"
    if sorted(stated) == sorted(class_names):
        raise ValueError(f"{difference}: the same classes in another order; the dataset must number them as the model")
    warnings.warn(f"{difference}; accuracies are right only if they mean the same", stacklevel=3)


def _as_list(names: Any) -> list[str]:
    return list(names.values() if isinstance(names, Mapping) else names or ())


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plain_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict as safetensors stores it: contiguous tensors that share no memory with each other."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in state_dict.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return plain


def stated_names(model: nn.Module) -> list[str] | None:
    """Return the names of the classes that the checkpoint of a model states, or None."""
    pretrained_cfg = getattr(timm_network(model), "pretrained_cfg", {})
    return label_names(model) or _unless_made_up(_as_list(pretrained_cfg.get("label_names")))


def _unless_made_up(names: list[str]) -> list[str] | None:
    """Return names of classes; None if there are none, or those that transformers gives where it knows none."""
    return None if all(name == f"LABEL_{label}" for label, name in enumerate(names)) else names


def label_names(model: nn.Module, *datasets: Any) -> list[str] | None:
    """Return the names of a model's classes from its configuration or the first dataset that has them, or None.

    Args:
        model: a transformers classifier with `config.id2label`, or any module.
        datasets: those of the `datasets` library whose `label` or `labels` is a `ClassLabel` or a list of them, and
            those with `classes` as torchvision's have; others are passed over.
    """
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    if stated := _unless_made_up([names[label] for label in sorted(names)]):
        return stated
    for dataset in datasets:
        features = getattr(dataset, "features", None) or {}
        for column in ("label", "labels"):
            feature = features.get(column)
            if names := getattr(getattr(feature, "feature", feature), "names", None):  # a ClassLabel
                return names
        classes = getattr(dataset, "classes", None)
        if isinstance(classes, Sequence) and all(isinstance(name, str) for name in classes):
            return list(classes)
    return None
