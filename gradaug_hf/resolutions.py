"""Input resolutions: those of the paper for a side, and those that a network can take."""

import inspect
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from gradaug_hf.slimming import meta_copy
from gradaug_hf.slimming.meta import example_images, example_sizes

# How far from a resolution that does not work one is looked for that does, in pixels.
SEARCH_RANGE = 64


def default_resolutions(side: int) -> list[int]:
    """1, 6/7, 5/7 and 4/7 of the input side, rounded: 224, 192, 160 and 128 of 224 pixels (arXiv 2006.07989)."""
    return [max(1, round(side * sevenths / 7)) for sevenths in (7, 6, 5, 4)]


class ResolutionTrial:
    """Tries a network at resolutions, on the meta device, where nothing is computed.

    Args:
        model: a timm network, a transformers classifier, or any module that maps images to logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copy = meta_copy(model).train()

    def error_at(self, side: int) -> Exception | None:
        """What the network raises for two images of this side in training mode, or None."""
        try:
            with torch.no_grad():
                self._copy(example_images(self._copy, 2, next(example_sizes(self._model, side))))
        except Exception as error:  # a network may raise anything at a size that it cannot take
            return error
        return None

    def accepted(self, sides: Iterable[int]) -> list[int]:
        """Those of the sides that the network can take."""
        return [side for side in sides if self.error_at(side) is None]

    def check(self, sides: Iterable[int]) -> None:
        """Make sure that the network can take every side.

        Raises:
            ValueError: it cannot; names the nearest sides that it can take.
        """
        for side in sides:
            if (error := self.error_at(side)) is not None:
                reason = str(error).strip().split("\n")[0]
                raise ValueError(
                    f"resolutions holds {side}, which {type(self._model).__name__} cannot take ({reason}); "
                    f"{self._advice(side)}"
                ) from error

    def default(self, side: int) -> list[int]:
        """The default resolutions for images of a side, without those that the network cannot take.

        Warns where there are such.

        Raises:
            ValueError: the network cannot take the side itself.
        """
        self.check([side])
        defaults = default_resolutions(side)
        usable = self.accepted(defaults)
        if usable != defaults:
            warnings.warn(
                f"{type(self._model).__name__} takes only {usable} of the resolutions {defaults}, so its sub-networks "
                f"use no others{dynamic_size_hint(self._model)}",
                stacklevel=2,
            )
        return usable

    def _advice(self, side: int) -> str:
        below = next(iter(self._working(range(side - 1, max(0, side - SEARCH_RANGE), -1))), None)
        above = next(iter(self._working(range(side + 1, side + SEARCH_RANGE))), None)
        near = [str(found) for found in (below, above) if found is not None]
        near = near or [str(found) for found in self.accepted(self._native())]
        return f"sides that it can take: {', '.join(near) or 'none was found'}{dynamic_size_hint(self._model)}"

    def _working(self, sides: Iterable[int]) -> Iterable[int]:
        return (side for side in sides if self.error_at(side) is None)

    def _native(self) -> list[int]:
        return list(dict.fromkeys(size[-1] for size in example_sizes(self._model, None)))


def dynamic_size_hint(model: nn.Module) -> str:
    """How to build a timm network of fixed input size so that it takes others, or an empty string."""
    network = getattr(model, "timm_model", model)
    if "dynamic_img_size" in inspect.signature(type(network).__init__).parameters:
        return "; build it with timm.create_model(..., dynamic_img_size=True) for others"
    return ""
