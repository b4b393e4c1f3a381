"""Weights files and the JSON beside them: read, and checked before a model is built from them."""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

CONFIG = "config.json"
# Types of fields of a `config.json`; timm and transformers meet another one late, or never.
FIELDS = {
    "architecture": (str, "the name of a timm model"),
    "num_classes": (int, "a number of classes"),
    "num_labels": (int, "a number of classes"),
    "model_args": (dict, "arguments by name"),
    "pretrained_cfg": (dict, "values by name"),
    "label_names": ((list, dict), "the names of the classes"),
    "id2label": (dict, "names of classes by number"),
}
DIFFERENCES_SHOWN = 5


class WeightsError(ValueError):
    """A file of a checkpoint is missing or damaged, or belongs to another model."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the values by name that a JSON file of a checkpoint holds; raise a `WeightsError` if it does not."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds a {type(content).__name__}; expected values by name")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Return what the `config.json` of a folder holds.

    Raises:
        WeightsError: it cannot be read, a field has a type that no model can be built from, or the weights are
            quantised.
    """
    file = folder / CONFIG
    config = read_json(file)
    for name, (kind, expected) in FIELDS.items():
        if config.get(name) is not None and not isinstance(config[name], kind):
            raise WeightsError(f"{file} has {name} {config[name]!r}; expected {expected}")
    if config.get("quantization_config") is not None:
        raise WeightsError(
            f"{file} says that the weights are quantised (quantization_config), so that they can be neither trained "
            "nor sliced; give the checkpoint that they were made from"
        )
    return config


def has_types(value: Any, template: Any) -> bool:
    """Return True if a value of a JSON file is built as a template says.

    Args:
        value: of the file.
        template: a type or union of types; a list with the template of all elements; a tuple with the template of each
            element; a dict with the template of each name that is needed, or with that of all values at `...`.
    """
    if isinstance(template, list):
        return isinstance(value, list) and all(has_types(each, template[0]) for each in value)
    if isinstance(template, tuple):
        return isinstance(value, list) and len(value) == len(template) and all(map(has_types, value, template))
    if isinstance(template, dict):
        names = value if ... in template and isinstance(value, dict) else template
        return isinstance(value, dict) and all(
            has_types(value.get(name), template.get(name, template.get(...))) for name in names
        )
    return isinstance(value, template) and not isinstance(value, bool)


def read_pickle(file: Path, **options: Any) -> Any:
    """Return the tensors and plain values that `torch.save` wrote; no code in the file is run.

    Raises:
        WeightsError: it cannot be read, or needs more than tensors and plain values.
    """
    try:
        with safe_globals():
            return torch.load(file, weights_only=True, **options)
    except Exception as error:  # nearly anything is raised for what is no checkpoint
        raise WeightsError(f"{file} {_why_unreadable(error)}") from error


def _why_unreadable(error: Exception) -> str:
    if not isinstance(error, pickle.UnpicklingError):
        return f"cannot be read as a checkpoint of PyTorch: {error}"
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"holds {found[1]} beside tensors and plain values, and is not read, since that could run code of its "
            "author; where you trust it, save its tensors and plain values alone by torch.save"
        )
    return "is no checkpoint of PyTorch"


def weights_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: `model.safetensors`, or those that its index names.

    Raises:
        WeightsError: the index cannot be read, or names something else than files of its folder.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise WeightsError(f"{index} has weight_map {files!r}; expected the name of a file for each tensor")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{index} names {name!r}, which is no safetensors file of its folder")
    return [folder / name for name in sorted(set(files.values()))]


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in the safetensors files of a folder.

    Raises:
        WeightsError: a file is missing, damaged or cut off, or lies elsewhere.
    """
    shapes = {}
    for file in weights_files(folder):
        try:
            with safe_open(file, "pt") as weights:
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise WeightsError(f"{file} is missing") from error
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{file} is damaged or cut off: {error}") from error
    return shapes


def check_weights(folder: Path, model: nn.Module, prefix: str = "") -> None:
    """Make sure that the weights of a folder are those of a model.

    Args:
        folder: with `model.safetensors`, in one file or several.
        model: the model that is to have them; one of tensors that share memory is enough.
        prefix: of the model's names; the names in the folder may lack it.

    Raises:
        WeightsError: a file is damaged, or tensors are missing, left over or of another shape; names the first.
    """
    found = {name.removeprefix(prefix): shape for name, shape in weight_shapes(folder).items()}
    state = model.state_dict()
    expected = {name.removeprefix(prefix): state[own] for name, own in saved_names(model).items()}
    stored = {tensor.data_ptr() for name, tensor in expected.items() if name in found}
    differences = [
        f"{name} is missing"
        for name, tensor in expected.items()
        if name not in found and tensor.numel() > 0 and tensor.data_ptr() not in stored
    ]
    differences += [f"{name} is left over" for name in found if name not in expected]
    differences += [
        f"{name} is {found[name]} and not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name] != tuple(tensor.shape)
    ]
    if differences:
        more = len(differences) - DIFFERENCES_SHOWN
        raise WeightsError(
            f"{folder} is of another network than {type(model).__name__}: "
            f"{'; '.join(differences[:DIFFERENCES_SHOWN])}{f'; and {more} more' if more > 0 else ''}"
        )


def saved_names(model: nn.Module) -> dict[str, str]:
    """Return the name under which transformers saves each tensor of a model -> the name that the model has for it.

    They differ for models that transformers wrote anew, ViT for example, and saves as they were before.
    """
    state = model.state_dict()
    own = {id(tensor): name for name, tensor in state.items()}
    saved = revert_weight_conversion(model, dict(state)) if isinstance(model, PreTrainedModel) else state
    names = {name: own.get(id(tensor)) for name, tensor in saved.items()}
    return {name: name for name in state} if None in names.values() else names


def take_saved_names(model: nn.Module) -> None:
    """Have `load_state_dict` of a model find tensors by their saved names, which the Trainer leaves as they are."""
    if isinstance(model, PreTrainedModel):
        model.register_load_state_dict_pre_hook(_rename)


def _rename(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for name, own in saved_names(model).items():
        if name != own and prefix + name in state_dict:
            state_dict[prefix + own] = state_dict.pop(prefix + name)


def check_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise a `WeightsError` that names the first tensor of a checkpoint with NaN or an infinite value."""
    wrong = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise WeightsError(
            f"the weights of {source} hold NaN or infinite values in {wrong[0]}{more}; give a checkpoint from before "
            "its training diverged"
        )
