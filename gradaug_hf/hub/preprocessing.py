"""The steps from an image to pixels in timm's terms (a data config), so that a model's folder can say them."""

import math
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn
from torchvision.transforms import v2
from transformers import (
    BitImageProcessor,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    ViTImageProcessor,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

# What a Trainer takes to prepare inputs, and saves with its model.
ProcessingClass = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin
# Largest share of a photo's side that is evaluated at a smaller size than a model was pretrained for. Random crops of
# training show objects larger than evaluation does (arXiv 1906.06423), which matters most where they are small.
SMALL_CROP = 0.8
# From this side on, ConvNextImageProcessor brings an image to a square without cropping it.
CONVNEXT_UNCROPPED = 384


def transform_data_config(transform: v2.Compose) -> dict[str, Any]:
    """Return the arguments of `timm.data.create_transform` that do what an evaluation transform does.

    Args:
        transform: steps among which are `Resize` of the short side, a square `CenterCrop` and `Normalize`.

    Returns:
        `input_size` (C, H, W) in pixels, `interpolation`, `crop_pct`, `crop_mode`, and `mean` and `std` in 0..1.

    Raises:
        ValueError: one of the three steps is missing.
    """
    steps = {type(step): step for step in transform.transforms}
    if missing := [kind.__name__ for kind in (v2.Resize, v2.CenterCrop, v2.Normalize) if kind not in steps]:
        found = ", ".join(kind.__name__ for kind in steps)
        raise ValueError(f"the evaluation transform has no {missing[0]}, only {found}; timm could not repeat it")
    normalize = steps[v2.Normalize]
    return {
        "input_size": (len(normalize.mean), *steps[v2.CenterCrop].size),
        "interpolation": v2.InterpolationMode(steps[v2.Resize].interpolation).value,
        "crop_pct": _crop_share(steps[v2.CenterCrop].size[0], steps[v2.Resize].size[0]),
        "crop_mode": "center",
        "mean": tuple(normalize.mean),
        "std": tuple(normalize.std),
    }


def processor_data_config(processor: BaseImageProcessor) -> dict[str, Any]:
    """Return the arguments of `timm.data.create_transform` that do what an image processor of transformers does.

    Args:
        processor: one that normalises, and resizes to a rectangle or to a short side with a centre crop.

    Returns:
        As of `transform_data_config`, without steps that the processor does not have or timm cannot do.
    """
    if isinstance(processor, TimmWrapperImageProcessor):
        return dict(processor.data_config)
    config = {}
    if getattr(processor, "do_normalize", False):
        config |= {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    if getattr(processor, "do_resize", False):
        config |= {"interpolation": PILImageResampling(processor.resample).name.lower(), **_sizes(processor)}
    return config


def image_processor_of(transform: v2.Compose, model: nn.Module) -> BaseImageProcessor:
    """Return an image processor of transformers that does what an evaluation transform does.

    Args:
        transform: as for `transform_data_config`.
        model: the one that it is for; a timm model, plain or wrapped, takes timm's processor.
    """
    return image_processor_doing(transform_data_config(transform), model)


def image_processor_doing(config: Mapping[str, Any], model: nn.Module) -> BaseImageProcessor:
    """Return an image processor of transformers that does what a data config of timm says.

    Args:
        config: as `transform_data_config` returns it; its `crop_mode` "center" or "squash".
        model: the one that it is for; a timm model, plain or wrapped, takes timm's processor.
    """
    if (pretrained_cfg := _pretrained_cfg(model)) is not None:
        return TimmWrapperImageProcessor(dict(config), architecture=pretrained_cfg.get("architecture"))
    _, height, width = config["input_size"]
    pixels = {
        "resample": PILImageResampling[config["interpolation"].upper()],
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
    }
    size = {"height": height, "width": width}
    if config["crop_mode"] == "squash":
        return ViTImageProcessor(size=size, **pixels)
    return BitImageProcessor(size={"shortest_edge": math.floor(height / config["crop_pct"])}, crop_size=size, **pixels)


def input_config(
    model: nn.Module, processor: BaseImageProcessor | None, side: int | None = None, crop_pct: float | None = None
) -> dict[str, Any]:
    """Return the input that a pretrained model is made for, as the arguments of `timm.data.create_transform`.

    Args:
        model: of timm or transformers.
        processor: of a checkpoint of transformers; None for one of timm.
        side: of the images in pixels; None: that of the model.
        crop_pct: share of an image's short side that evaluation keeps, in (0, 1]; None: that of the model, or at most
            SMALL_CROP for a smaller side than the model's.
    """
    own = (_pretrained_cfg(model) or {}) if processor is None else processor_data_config(processor)
    config = timm.data.resolve_data_config(pretrained_cfg=own or {"crop_mode": "center"})
    channels, _, own_side = config["input_size"]
    if side is not None:
        if crop_pct is None and side < own_side and config["crop_mode"] == "center":
            crop_pct = min(config["crop_pct"], SMALL_CROP)
        config |= {"input_size": (channels, side, side)}
    return config if crop_pct is None else config | {"crop_pct": crop_pct, "crop_mode": "center"}


def as_its_pipeline(transform: v2.Compose, model: nn.Module) -> v2.Compose:
    """Return an evaluation transform that rounds pixels as the pipeline of a model's folder does.

    Args:
        transform: steps that start from a PIL image.
        model: as for `image_processor_of`.
    """
    if _pretrained_cfg(model) is not None:
        return transform
    # The processors of transformers resize tensors, which torchvision rounds otherwise than Pillow its images.
    return v2.Compose([v2.ToImage(), *transform.transforms])


def _pretrained_cfg(model: nn.Module) -> dict[str, Any] | None:
    """Return timm's configuration of a model, plain or wrapped; None for one that is not timm's."""
    return getattr(getattr(model, "timm_model", model), "pretrained_cfg", None)


def _sizes(processor: BaseImageProcessor) -> dict[str, Any]:
    size = processor.size
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    crop_pct = getattr(processor, "crop_pct", None)  # of ConvNextImageProcessor and PoolFormerImageProcessor
    side = size.get("shortest_edge")
    if side is None:
        is_rectangle = crop is None and size.get("height")
        return _to_size(size["height"], size["width"], 1.0, "squash") if is_rectangle else {}
    if crop is None and crop_pct is None:
        return {}
    if crop is None and side >= CONVNEXT_UNCROPPED:
        return _to_size(side, side, 1.0, "squash")
    height, width = (side, side) if crop is None else (crop["height"], crop["width"])
    return _to_size(height, width, _crop_share(height, int(side / crop_pct) if crop_pct else side), "center")


def _to_size(height: int, width: int, crop_pct: float, crop_mode: str) -> dict[str, Any]:
    return {"input_size": (3, height, width), "crop_pct": crop_pct, "crop_mode": crop_mode}


def _crop_share(crop: int, side: int) -> float:
    """Return the share of the short side that is kept; timm resizes to `floor(crop / share)`, exactly `side`."""
    share = crop / side
    return share if math.floor(crop / share) == side else math.nextafter(share, 0)
