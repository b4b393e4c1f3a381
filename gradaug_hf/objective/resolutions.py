"""Input resolutions: those of the paper for a side, and those that a model can take."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any

import timm
import torch
from torch import nn

from gradaug_hf.objective.transforms import resized_shape
from gradaug_hf.slimming import meta_copy
from gradaug_hf.slimming.meta import example_images, example_sizes

# Distance in pixels within which a resolution that works is searched.
SEARCH_RANGE = 64
# Arguments of timm's constructors with which a model of fixed image size takes others.
DYNAMIC_SIZE = ({"dynamic_img_size": True}, {"dynamic_img_size": True, "dynamic_img_pad": True})


def default_resolutions(side: int) -> list[int]:
    """Return 1, 6/7, 5/7 and 4/7 of the input side: 224, 192, 160 and 128 of 224 pixels (arXiv 2006.07989)."""
    return [max(1, round(side * sevenths / 7)) for sevenths in (7, 6, 5, 4)]


class ResolutionTrial:
    """Try a model at resolutions, on the meta device, where nothing is computed.

    Args:
        model: a timm model, a transformers classifier, or any module that maps images to logits.
        shape: (height, width) of the images in pixels, which at each resolution keep their shape; None: square ones.
    """

    def __init__(self, model: nn.Module, *, shape: Sequence[int] | None = None) -> None:
        self._model = model
        self._copy = meta_copy(model).train()
        self._shape = shape

    def for_shape(self, shape: Sequence[int]) -> "ResolutionTrial":
        """Return a trial of the same model with images of another shape (height, width)."""
        other = copy(self)
        other._shape = shape
        return other

    def error_at(self, side: int) -> Exception | None:
        """Return the error that the model raises for two images of this side in training mode, or None."""
        try:
            with torch.no_grad():
                self._copy(example_images(self._copy, 2, next(example_sizes(self._model, self._shape_at(side)))))
        except Exception as error:  # a model may raise anything at a size that it cannot take
            return error
        return None

    def _shape_at(self, side: int) -> tuple[int, int]:
        return (side, side) if self._shape is None else resized_shape(self._shape, side)

    def accepted(self, sides: Iterable[int]) -> list[int]:
        """Return the sides that the model can take."""
        return list(self._working(sides))

    def check(self, sides: Iterable[int]) -> None:
        """Make sure that the model can take every side.

        Raises:
            ValueError: it cannot; names the nearest sides that it can take.
        """
        for side in sides:
            if (error := self.error_at(side)) is not None:
                reason = str(error).strip().split("\n")[0]
                height, width = self._shape_at(side)
                images = "" if height == width else f" for images of {height} x {width} pixels"
                raise ValueError(
                    f"resolutions holds {side}, which {type(self._model).__name__} cannot take{images} ({reason}); "
                    f"{self._advice(side)}"
                ) from error

    def default(self, side: int) -> list[int]:
        """Return the default resolutions for images of a side, each as near as the model can take.

        Warns where it can take nothing near.

        Raises:
            ValueError: the model cannot take the side itself.
        """
        self.check([side])
        defaults = default_resolutions(side)
        reach = side // 14  # half way from one to the next
        usable = [near for wanted in defaults if (near := self._nearest(wanted, reach)) is not None]
        if len(usable) < len(defaults):
            found = f"takes nothing near some of the resolutions {defaults}, so its sub-networks use {usable}"
            if len(usable) == 1:
                found = f"takes images of {side} pixels alone, so its sub-networks see no smaller ones"
            hint = dynamic_size_hint(self._model, defaults, self._shape)
            warnings.warn(f"{type(self._model).__name__} {found}{hint}", stacklevel=2)
        return usable

    def _advice(self, side: int) -> str:
        below = next(self._working(range(side - 1, max(0, side - SEARCH_RANGE), -1)), None)
        above = next(self._working(range(side + 1, side + SEARCH_RANGE)), None)
        near = [str(found) for found in (below, above) if found is not None]
        native = dict.fromkeys(size[-1] for size in example_sizes(self._model, None))
        near = near or [str(found) for found in self._working(native)]
        hint = dynamic_size_hint(self._model, [side], self._shape)
        return f"sides that it can take: {', '.join(near) or 'none was found'}{hint}"

    def _nearest(self, wanted: int, reach: int) -> int | None:
        near = sorted(range(wanted - reach, wanted + reach + 1), key=lambda side: abs(side - wanted))
        return next(self._working(near), None)

    def _working(self, sides: Iterable[int]) -> Iterator[int]:
        return (side for side in sides if self.error_at(side) is None)


def dynamic_size_hint(model: nn.Module, sides: Iterable[int], shape: Sequence[int] | None = None) -> str:
    """Return a hint how to build a timm model of fixed image size for other sides, or an empty string."""
    arguments = dynamic_size_arguments(model, sides, shape)
    if arguments is None:
        return ""
    network = getattr(model, "timm_model", model)
    call = _build_call(network.pretrained_cfg["architecture"], arguments, wrapped=network is not model)
    return f"; {call} builds it for {'that side alone' if 'img_size' in arguments else 'others'}"


def dynamic_size_arguments(
    model: nn.Module, sides: Iterable[int], shape: Sequence[int] | None = None
) -> dict[str, Any] | None:
    """Return the arguments with which timm builds a model that takes some sides, or None.

    Args:
        model: a timm model, a `TimmWrapperForImageClassification`, or any module.
        sides: in pixels. Where no argument makes the model take any size, one for a single side is
            returned if there is only one side.
        shape: (height, width) of the images in pixels; None: square ones.
    """
    network = getattr(model, "timm_model", model)
    name = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    if name is None or not timm.is_model(name):
        return None
    sides = list(sides)
    fixed_sizes = [{"img_size": side if shape is None else resized_shape(shape, side)} for side in sides]
    candidates = (*DYNAMIC_SIZE, *(fixed_sizes if len(sides) == 1 else ()))
    return next((each for each in candidates if _takes(name, each, sides, shape)), None)


def _takes(name: str, arguments: dict[str, Any], sides: list[int], shape: Sequence[int] | None) -> bool:
    try:
        with torch.device("meta"):
            network = timm.create_model(name, **arguments)
    except TypeError:  # its constructor has no such argument
        return False
    return ResolutionTrial(network, shape=shape).accepted(sides) == sides


def _build_call(name: str, arguments: dict[str, Any], wrapped: bool) -> str:
    if wrapped:
        return f"from_pretrained(..., model_args={arguments})"
    return f"timm.create_model({name!r}, {', '.join(f'{key}={value}' for key, value in arguments.items())})"
