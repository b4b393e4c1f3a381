"""Networks by name: timm's by their name, and checkpoints of timm or transformers in a folder or on the Hub."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import get_arch_pretrained_cfgs
from torch import nn
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from gradaug_hf.hub.configs import label_names
from gradaug_hf.models.shake_drop import add_shake_drop, residual_blocks
from gradaug_hf.trainer.checkpoints import read_json, weight_shapes

CONFIG = "config.json"
# Characters that are shown of a long list of tensors.
MESSAGE_LENGTH = 400
SHAKE_DROP = "shake_drop_rate"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# What is read of a repository on the Hub: no pickle, no code, nothing in or above its folder's folders.
READ, NOT_READ = ["*.json", "*.safetensors"], ["*/*"]
ACCEPTED = "a timm network, a folder with a config.json and a Hub id (user/name or user/name@revision) are accepted"


def is_checkpoint(model: str) -> bool:
    """Whether a network comes with weights, from a folder or the Hub, rather than by its name in timm alone."""
    return "/" in model or not timm.is_model(model)


def pretrained_source(model: str) -> str:
    """Return the folder or Hub id with the pretrained weights of a model.

        >>> pretrained_source("resnet50.a1_in1k")
        'timm/resnet50.a1_in1k'

    Args:
        model: folder, Hub id, or a name of timm, with or without the tag of its weights.

    Raises:
        ValueError: timm has no weights of this name that the Hub holds.
    """
    if is_checkpoint(model):
        return model
    name = model.partition(".")[0]
    known = {tagged: config for tagged, config in get_arch_pretrained_cfgs(name).items() if config.hf_hub_id}
    found = next(iter(known), model) if name == model else model
    if found not in known:
        raise ValueError(
            f"model is {model!r}, of which timm has no weights on the Hub; it has {', '.join(known) or 'none'}"
            f" of {name}"
        )
    return known[found].hf_hub_id


def timm_name(model: str) -> str | None:
    """Name under which `timm.create_model` knows a network; None where it is one of transformers.

    Args:
        model: name in timm's registry, folder with a `config.json`, or Hub id, as `user/name` or `user/name@revision`.

    Raises:
        ValueError: there is no such network, or it cannot be reached or read.
    """
    if not is_checkpoint(model):
        return model
    folder = checkpoint_folder(model)
    return f"local-dir:{folder}" if _is_timms(read_json(folder / CONFIG)) else None


def _is_timms(config: Mapping[str, Any]) -> bool:
    """Whether timm can read a configuration, rather than transformers, of its own network or of one of timm."""
    return isinstance(config.get("model_args", {}), dict) and "pretrained_cfg" in config


def checkpoint_folder(model: str) -> Path:
    """The folder of a checkpoint, which is downloaded from the Hub if it is there.

    Of a repository only JSON files and safetensors at its top are downloaded, so that nothing in it is run.

    Args:
        model: folder with a `config.json`, or Hub id, as `user/name` or `user/name@revision`.

    Raises:
        ValueError: there is no such checkpoint, it cannot be reached, or its weights are no safetensors.
    """
    if Path(model).is_dir():
        return Path(model)
    if "/" not in model:
        similar = ", ".join(get_close_matches(model, timm.list_models())) or "none of a similar name"
        raise ValueError(f"model is {model!r}, which is unknown; {ACCEPTED}. timm has {similar}")
    name, _, revision = model.partition("@")
    with _download_errors(model, name, revision):
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=READ, ignore_patterns=NOT_READ)
        )
    _check_downloaded(model, folder)
    return folder


@contextmanager
def _download_errors(model: str, name: str, revision: str) -> Iterator[None]:
    """Say in one message why a repository cannot be downloaded."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"model {model!r} is gated: accept its terms at https://huggingface.co/{name}, then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"model is {model!r}, but {name} has no revision {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"model is {model!r}, which is neither a folder nor on the Hub; {ACCEPTED}. If it is private, run "
            "`hf auth login`"
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        cause = error if isinstance(error, HTTPError) else error.__cause__
        if not isinstance(cause, HfHubHTTPError):
            raise ValueError(f"model {model!r} is no folder, and the Hub cannot be reached: {cause}") from error
        status = cause.response.status_code
        remedy = "run `hf auth login` with a token that may read it" if status in (401, 403) else "try again later"
        raise ValueError(f"model {model!r} cannot be downloaded: the Hub answers {status}; {remedy}") from error


def _check_downloaded(model: str, folder: Path) -> None:
    """Make sure that what came from the Hub is all there, in safetensors, and needs no code of its own.

    Raises:
        ValueError: it is not.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"model {model!r} has no {CONFIG} on the Hub")
    config = read_json(folder / CONFIG)
    shards = []
    if not _is_timms(config):
        if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(f"model {model!r} needs code of its own repository, which is not run")
        if not (folder / WEIGHTS).is_file() and (folder / WEIGHTS_INDEX).is_file():
            shards = sorted(set(read_json(folder / WEIGHTS_INDEX).get("weight_map", {}).values()))
    for name in shards or [WEIGHTS]:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"model {model!r}: {WEIGHTS_INDEX} names {name!r}, which is no file of its folder")
        if not (folder / name).is_file():
            raise ValueError(
                f"model {model!r} has no {name} on the Hub; weights in other formats can hold code and are not read"
            )


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
    if is_checkpoint(model):
        return load_checkpoint(model, class_names, arguments)
    return _create_timm_network(model, False, {"num_classes": len(class_names)}, dict(arguments))


def network_to_train(model: str, *datasets: Any) -> nn.Module:
    """Return the model of a checkpoint with its own classes, or a new one of timm with those that a dataset names.

    Args:
        model: as for `timm_name`.
        datasets: asked for the names of their classes as by `label_names`.

    Raises:
        ValueError: there is no such model, it cannot be loaded, or no dataset names its classes.
    """
    if is_checkpoint(model):
        return load_checkpoint(model)
    classes = label_names(nn.Identity(), *datasets)
    if classes is None:
        raise ValueError(
            f"model is {model!r}, but no dataset names its classes (by `features` or `classes`); give "
            f"timm.create_model({model!r}, num_classes=...)"
        )
    return create_network(model, classes, {})


def load_checkpoint(
    model: str, class_names: Sequence[str] | None = None, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """The network of a folder or of the Hub.

    Args:
        model: as for `checkpoint_folder`.
        class_names: as for `create_network`; None keeps the classifier.
        arguments: of a timm network, by the names of `accepted_arguments`.

    Raises:
        ValueError: as `checkpoint_folder`.
    """
    folder = checkpoint_folder(model)
    if _is_timms(read_json(folder / CONFIG)):
        classes = {} if class_names is None else {"num_classes": len(class_names)}
        with _loading(folder):
            return _create_timm_network(f"local-dir:{folder}", True, classes, dict(arguments or {}))
    network = _load_classifier(folder, class_names)
    if not Path(model).is_dir():  # the model card names where it came from, not where it was downloaded to
        network.name_or_path = network.config.name_or_path = model.partition("@")[0]
    return network


def _load_classifier(folder: Path, class_names: Sequence[str] | None) -> PreTrainedModel:
    """A classifier of transformers, which on its own would draw at random what its weights lack."""
    classes = {}
    if class_names is not None:
        classes = {
            "num_labels": len(class_names),
            "id2label": dict(enumerate(class_names)),
            "label2id": {name: label for label, name in enumerate(class_names)},
            "ignore_mismatched_sizes": True,
        }
    with _loading(folder):
        network, report = AutoModelForImageClassification.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True, **classes
        )
    missing = sorted(report["missing_keys"])
    if missing and class_names is None:
        raise ValueError(
            f"the weights of {folder} are of another network than {type(network).__name__}: they lack "
            f"{', '.join(missing)[:MESSAGE_LENGTH]}"
        )
    return network


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Name the file of a folder that is damaged, and tensors that are not of the network in its `config.json`.

    Raises:
        ValueError: there are such.
    """
    weight_shapes(folder)
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:MESSAGE_LENGTH]
        raise ValueError(f"the weights of {folder} cannot be loaded: {reason}") from error


def _create_timm_network(
    name: str, pretrained: bool, classes: Mapping[str, int], arguments: dict[str, Any]
) -> nn.Module:
    shakes_itself = SHAKE_DROP not in arguments or SHAKE_DROP in _parameters(_meta_network(name))
    rate = 0.0 if shakes_itself else arguments.pop(SHAKE_DROP)
    network = timm.create_model(name, pretrained=pretrained, **classes, **arguments)
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
    network = load_checkpoint(model) if is_checkpoint(model) else timm.create_model(model, pretrained=True)
    found = network.config.num_labels if isinstance(network, PreTrainedModel) else network.num_classes
    if found != num_classes:
        raise ValueError(f"model {model!r} has {found} classes, the data set {num_classes}")
    return network


def image_processor(model: str) -> BaseImageProcessor | None:
    """The image processor that comes with a checkpoint of transformers, if one does."""
    if timm_name(model) is not None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(checkpoint_folder(model), trust_remote_code=False)
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
