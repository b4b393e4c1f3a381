"""Networks by name: timm's by their name, and checkpoints of timm or transformers in a folder or on the Hub."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.image_processing_utils import BaseImageProcessor

from gradaug_hf.checkpoints import weight_shapes
from gradaug_hf.models.shake_drop import add_shake_drop, residual_blocks

CONFIG = "config.json"
# Characters that are shown of a long list of tensors.
MESSAGE_LENGTH = 400
SHAKE_DROP = "shake_drop_rate"


def timm_name(model: str) -> str | None:
    """Name under which `timm.create_model` knows a network; None where it is one of transformers.

    Args:
        model: name in timm's registry, Hub id, or folder with a `config.json`.

    Raises:
        ValueError: there is no such network, or it cannot be reached.
    """
    if "/" not in model and timm.is_model(model):
        return model
    is_folder = Path(model).is_dir()
    config = _read_config(Path(model) / CONFIG if is_folder else _download_config(model))
    if not isinstance(config.get("model_args", {}), dict) or "pretrained_cfg" not in config:
        return None  # transformers wrote it, of its own network or of one of timm
    return f"{'local-dir' if is_folder else 'hf-hub'}:{model}"


def is_checkpoint(model: str) -> bool:
    """Whether a network comes with trained weights, rather than by its name in timm's registry alone."""
    return timm_name(model) != model


def _download_config(model: str) -> Path:
    accepted = "a timm network, a folder with a config.json and a Hub id are accepted"
    if "/" not in model:
        similar = ", ".join(get_close_matches(model, timm.list_models())) or "none of a similar name"
        raise ValueError(f"model is {model!r}, which is unknown; {accepted}. timm has {similar}")
    try:
        return Path(hf_hub_download(model, CONFIG))
    except GatedRepoError as error:
        raise ValueError(
            f"model {model!r} is gated: accept its terms at https://huggingface.co/{model}, then run `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(f"model {model!r} is no folder, and the Hub cannot be reached to look for it") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"model is {model!r}, which is neither a folder nor on the Hub; {accepted}") from error


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"model: {file} cannot be read: {error}") from error


def accepted_arguments(model: str) -> set[str]:
    """What a network can be built with: its constructor's parameters, and ShakeDrop where its blocks take it.

    None for a network of transformers.

    Args:
        model: as for `timm_name`.
    """
    name = timm_name(model)
    if name is None:
        return set()
    network = _meta_network(name)
    return _parameters(network) | ({SHAKE_DROP} if residual_blocks(network) else set())


def _meta_network(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def _parameters(network: nn.Module) -> set[str]:
    return set(inspect.signature(type(network).__init__).parameters)


def create_network(model: str, class_names: Sequence[str], arguments: Mapping[str, Any]) -> nn.Module:
    """A network to train: from scratch if `model` names one of timm, else with the weights of the checkpoint.

    Args:
        model: as for `timm_name`.
        class_names: in the order of the labels; another classifier than the checkpoint's is made where they differ in
            number.
        arguments: of a timm network, by the names of `accepted_arguments`.
    """
    name = timm_name(model)
    if name is not None:
        with _loading(model):
            return _create_timm_network(name, is_checkpoint(model), len(class_names), dict(arguments))
    with _loading(model):
        return AutoModelForImageClassification.from_pretrained(
            model,
            num_labels=len(class_names),
            id2label=dict(enumerate(class_names)),
            label2id={name: label for label, name in enumerate(class_names)},
            ignore_mismatched_sizes=True,
        )


@contextmanager
def _loading(model: str) -> Iterator[None]:
    """Name the file of a folder that is damaged, and tensors that are not of the network in its `config.json`.

    Raises:
        ValueError: there are such.
    """
    if Path(model).is_dir():
        weight_shapes(Path(model))
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:MESSAGE_LENGTH]
        raise ValueError(f"the weights of {model} cannot be loaded: {reason}") from error


def _create_timm_network(name: str, pretrained: bool, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    shakes_itself = SHAKE_DROP not in arguments or SHAKE_DROP in _parameters(_meta_network(name))
    rate = 0.0 if shakes_itself else arguments.pop(SHAKE_DROP)
    network = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
    if rate > 0:
        add_shake_drop(network, rate)
    return network


def load_network(model: str, num_classes: int) -> nn.Module:
    """A trained network to evaluate.

    Args:
        model: as for `timm_name`; a name of timm, such as `resnet50.a1_in1k`, gives its pretrained weights.
        num_classes: of the data set.

    Raises:
        ValueError: the network has another number of classes.
    """
    name = timm_name(model)
    with _loading(model):
        if name is not None:
            network = timm.create_model(name, pretrained=True)
            found = network.num_classes
        else:
            network = _load_whole(model)
            found = network.config.num_labels
    if found != num_classes:
        raise ValueError(f"model {model!r} has {found} classes, the data set {num_classes}")
    return network


def _load_whole(model: str) -> nn.Module:
    """A classifier of transformers, which on its own would draw at random what its weights lack."""
    network, report = AutoModelForImageClassification.from_pretrained(model, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the weights of {model} are of another network than {type(network).__name__}: they lack "
            f"{', '.join(missing)[:MESSAGE_LENGTH]}"
        )
    return network


def image_processor(model: str) -> BaseImageProcessor | None:
    """The image processor that comes with a checkpoint of transformers, if one does."""
    if timm_name(model) is not None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(model)
    except OSError:
        return None


def pixel_statistics(network: nn.Module, processor: BaseImageProcessor | None) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` of the images that a network expects, of each channel in 0..1; nothing if it does not say.

    Args:
        network: of timm or transformers.
        processor: of a network of transformers.
    """
    if hasattr(network, "pretrained_cfg"):
        config = timm.data.resolve_model_data_config(network)
    elif processor is None:
        return {}
    else:  # the processor of a TimmWrapper has timm's configuration
        config = getattr(processor, "data_config", None) or {"mean": processor.image_mean, "std": processor.image_std}
    return {name: tuple(config[name]) for name in ("mean", "std")}
