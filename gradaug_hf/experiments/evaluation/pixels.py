"""Models that take pixels: images in 0..1 go in, and the normalisation is a part of the model."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from gradaug_hf.data.transforms import LimitAspectRatio, Transform
from gradaug_hf.hub.networks import image_processor, load_network, pixel_statistics
from gradaug_hf.objective.logits import logits_of
from gradaug_hf.slimming.meta import example_sizes

# ImageNet's images are evaluated on the centre of 256 pixels, those of datasets of small images as they are.
CROP = 224 / 256
SMALL_SIDE = 96


class PixelNetwork(nn.Module):
    """A model of timm or transformers behind the normalisation of its images."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (N, channels, H, W) in 0..1 to logits (N, classes)."""
        return logits_of(self.network((pixels - self.mean) / self.std), len(pixels))


def load_pixel_network(model: str, class_names: Sequence[str]) -> PixelNetwork:
    """Load a trained model to evaluate: on pixels, in eval mode and float32, without gradients of its parameters.

    Raises:
        ValueError: as `load_network`, or the model does not say how its images are normalised.
    """
    loaded = load_network(model, class_names)
    statistics = pixel_statistics(loaded, image_processor(model))
    if not statistics:
        raise ValueError(
            f"model {model!r} does not say by which mean and std its images are normalised; its folder must hold a "
            "preprocessor_config.json"
        )
    return PixelNetwork(loaded, **statistics).float().eval().requires_grad_(False)


def native_side(model: PixelNetwork) -> int:
    """Return the side in pixels of the images that a model was made for."""
    return next(iter(example_sizes(model.network, None)))[-1]


def pixel_transform(side: int) -> Transform:
    """Make ImageNet-C's transform: the short side resized to 8/7 of `side`, then the centre, a square of `side`.

    Up to 96 pixels the short side is resized to `side` itself.

    Returns:
        Function of an RGB image that returns a uint8 tensor (3, side, side).
    """
    resized = side if side <= SMALL_SIDE else round(side / CROP)
    return v2.Compose([LimitAspectRatio(), v2.Resize(resized), v2.CenterCrop(side), v2.ToImage(), v2.ToPureTensor()])


def to_unit(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in 0..1."""
    return pixels.float() / 255


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the state dict, by which a model is recognised."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
