"""Models by name: timm's by their name, and checkpoints of timm or transformers in a folder or on the Hub."""

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
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from gradaug_hf.hub.configs import PREPROCESSOR, check_class_names, label_names, timm_network
from gradaug_hf.hub.preprocessing import processor_data_config
from gradaug_hf.hub.weights import CONFIG, WeightsError, check_finite, read_config, weight_shapes, weights_files
from gradaug_hf.models.shake_drop import add_shake_drop, residual_blocks
from gradaug_hf.utils.randomness import random_states_kept

# Characters of a library's error that are shown, and of a list of tensors.
MESSAGE_LENGTH = 400
SHAKE_DROP = "shake_drop_rate"
# Files of a repository on the Hub that are downloaded: JSON and safetensors at its top, so neither pickles nor code.
READ, NOT_READ = ["*.json", "*.safetensors"], ["*/*"]
ACCEPTED = "a timm model, a folder with a config.json and a Hub id (user/name or user/name@revision) are accepted"


def is_checkpoint(model: str) -> bool:
    """Return whether a model comes with weights, from a folder or the Hub, rather than by its name in timm alone."""
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
    """Return the name under which `timm.create_model` knows a model; None for a model of transformers.

    Args:
        model: name in timm's registry, folder with a `config.json`, or Hub id, as `user/name` or `user/name@revision`.

    Raises:
        ValueError: there is no such model, or it cannot be reached or read.
    """
    if not is_checkpoint(model):
        return model
    folder = checkpoint_folder(model)
    return f"local-dir:{folder}" if _is_timms(read_config(folder)) else None


def _is_timms(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration of a timm model is one that timm can read, rather than transformers."""
    return isinstance(config.get("model_args", {}), dict) and "pretrained_cfg" in config


def checkpoint_folder(model: str) -> Path:
    """Return the folder of a checkpoint, after downloading it if it is on the Hub.

    Only JSON files and safetensors at the top of a repository are downloaded, so that nothing in it is run.

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
    """Raise a ValueError where a download from the Hub is incomplete, not in safetensors, or needs code of its own."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"model {model!r} has no {CONFIG} on the Hub")
    config = read_config(folder)
    if not _is_timms(config) and "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"model {model!r} needs code of its own repository, which is not run")
    for file in weights_files(folder):
        if not file.is_file():
            raise ValueError(
                f"model {model!r} has no {file.name} on the Hub; weights in other formats can hold code and are not "
                "read"
            )


def accepted_arguments(model: str) -> set[str]:
    """Return the arguments that a model can be built with: its constructor's, and ShakeDrop where its blocks take it.

    A model of transformers has none. Names and errors are those of `timm_name`.
    """
    name = timm_name(model)
    if name is None:
        return set()
    with _loading_errors(model):
        network = _meta_model(name)
    return _parameters(network) | ({SHAKE_DROP} if residual_blocks(network) else set())


def _meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def _parameters(model: nn.Module) -> set[str]:
    """Return the parameters of a constructor and, where it passes others on, of those that it inherits from."""
    found: set[str] = set()
    for cls in (cls for cls in type(model).__mro__ if "__init__" in vars(cls)):
        parameters = inspect.signature(cls.__init__).parameters
        found |= set(parameters)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def create_network(model: str, class_names: Sequence[str], arguments: Mapping[str, Any]) -> nn.Module:
    """Return a model to train: from scratch if `model` names one of timm, else as `load_checkpoint` loads it.

    Args:
        model: a name that `timm_name` takes.
        class_names: in the order of the labels; another classifier than the checkpoint's is made where they differ in
            number.
        arguments: of a timm model, by the names of `accepted_arguments`.
    """
    if is_checkpoint(model):
        return load_checkpoint(model, class_names, arguments)
    return _create_timm_model(model, class_names, arguments)


def network_to_train(model: str, *datasets: Any) -> nn.Module:
    """Return the model of a checkpoint with its own classes, or a new one of timm with those that a dataset names.

    Raises:
        ValueError: there is no such model, it cannot be loaded, the dataset has its classes in another order, or no
            dataset names the classes of a new one.
    """
    classes = label_names(nn.Identity(), *datasets)
    if is_checkpoint(model):
        loaded = load_checkpoint(model)
        check_class_names(loaded, classes or (), model)
        return loaded
    if classes is None:
        raise ValueError(
            f"model is {model!r}, but no dataset names its classes (by `features` or `classes`); give "
            f"timm.create_model({model!r}, num_classes=...)"
        )
    return create_network(model, classes, {})


def load_checkpoint(
    model: str, class_names: Sequence[str] | None = None, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return the model of a checkpoint, with another classifier where `class_names` differ in number from its own.

    Raises:
        ValueError: as `checkpoint_folder`; or its files are damaged, do not fit each other, or hold NaN. Only the
            classifier may differ from the weights, and only where `class_names` are given.
    """
    folder = checkpoint_folder(model)
    config = read_config(folder)
    weight_shapes(folder)
    with _loading_errors(folder):
        if _is_timms(config):
            loaded = _create_timm_model(f"local-dir:{folder}", class_names, arguments)
        else:
            loaded = _load_classifier(folder, class_names)
    check_finite(loaded.state_dict(), folder)
    if isinstance(loaded, PreTrainedModel) and not Path(model).is_dir():
        loaded.name_or_path = loaded.config.name_or_path = model.partition("@")[0]  # not the cache's folder
    return loaded


@contextmanager
def _loading_errors(source: str | Path) -> Iterator[None]:
    """Say in one message, a `WeightsError`, why timm or transformers cannot build a model from its files."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # whatever a wrong value in a configuration leads to
        reason = " ".join(str(error).split())[:MESSAGE_LENGTH]
        if isinstance(error, RuntimeError) and "loading state_dict" in reason:  # torch's own words
            raise WeightsError(f"the weights of {source} are of another network: {reason}") from error
        raise WeightsError(
            f"{source} cannot be loaded: {type(error).__name__}: {reason}; its {CONFIG} and its weights must be as "
            "timm or transformers wrote them"
        ) from error


def _create_timm_model(name: str, class_names: Sequence[str] | None, arguments: Mapping[str, Any] | None) -> nn.Module:
    """Return a timm model; the names of folders, `local-dir:FOLDER`, give it their weights."""
    pretrained, arguments = name.startswith("local-dir:"), dict(arguments or {})
    if pretrained and class_names is not None:
        with random_states_kept():
            timm.create_model(name, pretrained=True)  # timm misses no tensor once it makes a classifier of its own
    shakes_itself = SHAKE_DROP not in arguments or SHAKE_DROP in _parameters(_meta_model(name))
    rate = 0.0 if shakes_itself else arguments.pop(SHAKE_DROP)
    classes = {} if class_names is None else {"num_classes": len(class_names)}
    model = timm.create_model(name, pretrained=pretrained, **classes, **arguments)
    if rate > 0:
        add_shake_drop(model, rate)
    return model


def _load_classifier(folder: Path, class_names: Sequence[str] | None) -> PreTrainedModel:
    """Return a classifier of transformers, which on its own would fill in at random what its weights lack."""
    classes = {}
    if class_names is not None:
        classes = {
            "num_labels": len(class_names),
            "id2label": dict(enumerate(class_names)),
            "label2id": {name: label for label, name in enumerate(class_names)},
        }
    model, report = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **classes
    )
    lacking = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if lacking and class_names is not None:
        lacking -= set(head_parameters(model))
    if lacking:
        raise WeightsError(
            f"the weights of {folder} are of another network than {type(model).__name__}: they lack "
            f"{', '.join(sorted(lacking))[:MESSAGE_LENGTH]}, or have other shapes there"
        )
    return model


def head_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a model's classifier.

    A classifier of transformers has its backbone under a name of the architecture; where it has no such part, its last
    one with parameters is the classifier.

    Raises:
        ValueError: it has none, or does not say which they are.
    """
    found, parameters = [], dict(model.named_parameters())
    if (network := timm_network(model)) is not None:
        heads = network.get_classifier()
        own = {id(p) for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()}
        found = [name for name, parameter in parameters.items() if id(parameter) in own]
    elif isinstance(model, PreTrainedModel):
        parts = list(dict.fromkeys(name.partition(".")[0] for name in parameters))
        backbone = model.base_model_prefix
        heads = [part for part in parts if part != backbone] if backbone in parts else parts[-1:]
        found = [name for name in parameters if name.partition(".")[0] in heads]
    if not found:
        raise ValueError(f"{type(model).__name__} does not say which of its parameters are the classifier's")
    return tuple(found)


def load_network(model: str, class_names: Sequence[str]) -> nn.Module:
    """Return a trained model to evaluate.

    Args:
        model: a name that `timm_name` takes; one of timm, such as `resnet50.a1_in1k`, gives its pretrained weights.
        class_names: of the dataset, in the order of the labels; other names than the model's are warned of.

    Raises:
        ValueError: as `load_checkpoint`, or the model has another number or order of classes.
    """
    loaded = load_checkpoint(model) if is_checkpoint(model) else timm.create_model(model, pretrained=True)
    found = loaded.config.num_labels if isinstance(loaded, PreTrainedModel) else loaded.num_classes
    if found != len(class_names):
        raise ValueError(f"model {model!r} has {found} classes, the data set {len(class_names)}")
    check_class_names(loaded, class_names, model)
    return loaded


def image_processor(model: str) -> BaseImageProcessor | None:
    """Return the image processor that comes with a checkpoint of transformers; None if none does.

    Raises:
        ValueError: its configuration is damaged, or needs code of its own.
    """
    if timm_name(model) is not None:
        return None
    file = checkpoint_folder(model) / PREPROCESSOR
    with _loading_errors(file):
        try:
            return AutoImageProcessor.from_pretrained(file.parent, trust_remote_code=False)
        except OSError:
            if file.is_file():
                raise
            return None


def pixel_statistics(model: nn.Module, processor: BaseImageProcessor | None) -> dict[str, tuple[float, ...]]:
    """Return `mean` and `std` of the images that a model expects, of each channel in 0..1; nothing if it has none.

    A processor that does not normalise leaves pixels in 0..1, with a mean of 0 and a deviation of 1.
    """
    if hasattr(model, "pretrained_cfg"):
        config = timm.data.resolve_model_data_config(model)
    else:
        unchanged = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        config = {} if processor is None else unchanged | processor_data_config(processor)
    return {name: tuple(config[name]) for name in ("mean", "std") if name in config}
