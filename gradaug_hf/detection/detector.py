"""Faster and Mask R-CNN of torchvision on models of timm."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_model_args
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from transformers import AutoModelForImageClassification
from transformers.hf_argparser import HfArg

from gradaug_hf.detection.pyramid import Pyramid
from gradaug_hf.experiments.arguments import CheckedArguments
from gradaug_hf.hub.configs import CONFIG, timm_network
from gradaug_hf.hub.networks import is_checkpoint, pixel_statistics, timm_name
from gradaug_hf.hub.weights import read_json
from gradaug_hf.slimming import make_slimmable, meta_copy
from gradaug_hf.slimming.meta import example_images
from gradaug_hf.trainer.ranges import check_side
from gradaug_hf.utils.attributes import replaced

DETECTORS = ("mask_rcnn", "faster_rcnn")
WEIGHTS = "model.safetensors"
ASPECT_RATIOS = (0.5, 1.0, 2.0)
SIZE_DIVISOR = 32  # batches of images are padded to multiples of it
MASK_LAYERS = 4


@dataclass(frozen=True)
class DetectorSettings(CheckedArguments):
    """Kind, image sides and sizes of a new detector."""

    detector: str = HfArg(
        default="mask_rcnn",
        help="Faster R-CNN finds boxes, Mask R-CNN boxes and masks.",
        metadata={"choices": list(DETECTORS)},
    )
    min_size: int = HfArg(default=800, help="Shorter side in pixels that images are resized to.")
    max_size: int = HfArg(default=1333, help="Longest side in pixels, which no image exceeds.")
    anchor_scale: float = HfArg(default=8.0, help="Sides of a level's anchors over its stride.")
    channels: int = HfArg(default=256, help="Channels of the feature pyramid and of the mask head.")
    box_head_size: int = HfArg(default=1024, help="Size of the two layers of the box head.")
    rois_per_image: int = HfArg(default=512, help="Proposals of an image that box and mask head are trained on.")

    def __post_init__(self) -> None:
        self._check("detector", self.detector in DETECTORS, f"one of {', '.join(map(repr, DETECTORS))}")
        self._check_least(1, "min_size", "channels", "box_head_size", "rois_per_image")
        self._check("max_size", self.max_size >= self.min_size, f"at least min_size, {self.min_size}")
        self._check("anchor_scale", 0 < self.anchor_scale < math.inf, "above 0 and finite")
        check_side("max_size", self.max_size)

    @property
    def has_masks(self) -> bool:
        return self.detector == "mask_rcnn"


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(DetectorSettings):
    """Everything that a detector is built from: the content of its folder's `config.json`.

    Args:
        backbone: architecture in timm's registry.
        categories: `id` and `name` of each, as in COCO's files; labels count them from 1 on.
        backbone_args: of the architecture's constructor.
        image_mean: of the images that the backbone expects, in 0..1.
        image_std: likewise.
    """

    backbone: str
    categories: list[dict[str, Any]]
    backbone_args: dict[str, Any] = field(default_factory=dict)
    image_mean: Sequence[float] = (0.485, 0.456, 0.406)
    image_std: Sequence[float] = (0.229, 0.224, 0.225)


class Detector(nn.Module):
    """A detector whose images can be given another size for a pass.

    Args:
        settings: what it is built from; the weights are new.

    Raises:
        ValueError: the backbone is unknown or does not give its feature maps.
    """

    def __init__(self, settings: DetectorConfig) -> None:
        super().__init__()
        self.settings = settings
        if not timm.is_model(settings.backbone):
            raise ValueError(f"backbone is {settings.backbone!r}, which is no architecture of timm")
        network = timm.create_model(settings.backbone, num_classes=0, **settings.backbone_args)
        self.rcnn = _build_rcnn(Pyramid(network, settings.channels), settings)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        resolution: int | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the losses by name while training, else the detections of each image.

        Args:
            images: each (3, H, W), in 0..1.
            targets: `boxes` (objects, 4) as corners, `labels` (objects,) from 1 on and, for Mask R-CNN, `masks`
                (objects, H, W) of each image; needed while training.
            resolution: shorter side in pixels that images and targets are resized to; None: `settings.min_size`.
                The longest side changes with it.
        """
        side = resolution or self.settings.min_size
        longest = round(self.settings.max_size * side / self.settings.min_size)
        with replaced(self.rcnn.transform, min_size=(side,), max_size=longest):
            return self.rcnn(images, targets)

    @property
    def bottom_up(self) -> nn.Module:
        """Return backbone and lateral convolutions, the part that sub-networks slice."""
        return self.rcnn.backbone.bottom_up

    def make_slimmable(self, width_divisor: int = 1) -> None:
        """Make the bottom-up part slimmable in place, as `gradaug_hf.make_slimmable` does."""
        make_slimmable(self.bottom_up, input_size=padded(self.settings.min_size), width_divisor=width_divisor)

    def save_config(self, folder: str | Path) -> None:
        """Write `config.json`; with the state dict as `model.safetensors` beside it `load` reads the folder."""
        (Path(folder) / CONFIG).write_text(json.dumps(asdict(self.settings), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, model: str) -> "Detector":
        """Load a detector that was saved.

        Raises:
            ValueError: there is none, or its files do not fit each other.
        """
        settings = _read_settings(_file_of(model, CONFIG))
        detector, file = cls(settings), _file_of(model, WEIGHTS)
        try:
            detector.load_state_dict(load_file(file))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        except RuntimeError as error:
            raise ValueError(f"the weights of {model} are not those of its {CONFIG}: {error}") from error
        return detector


def create_detector(
    backbone: str, categories: Sequence[dict[str, Any]], backbone_args: dict[str, Any] | None = None, **settings: Any
) -> tuple[Detector, str]:
    """Make a detector to train, on the weights of a classifier's checkpoint if one is named.

    Args:
        backbone: name of a timm model, whose weights are new; or a folder or Hub id of timm or transformers.
        categories: `id` and `name` of each.
        backbone_args: of the constructor of the timm network.
        settings: further fields of DetectorConfig.

    Returns:
        The detector, and what was loaded into its backbone, in words.

    Raises:
        ValueError: the backbone cannot be found, is no model of timm, or cannot take images of these sides.
    """
    network = load_classifier(backbone, backbone_args or {})
    arguments = {name: value for name, value in get_model_args(network).items() if name != "num_classes"}
    statistics = {f"image_{name}": value for name, value in pixel_statistics(network, None).items()}
    architecture = network.pretrained_cfg["architecture"]
    detector = Detector(
        DetectorConfig(
            backbone=architecture, categories=list(categories), backbone_args=arguments, **statistics, **settings
        )
    )
    check_sizes(detector)
    if not is_checkpoint(backbone):
        return detector, f"backbone {backbone}: new weights"
    return detector, load_backbone(detector, network.state_dict(), backbone)


def check_sizes(detector: Detector) -> None:
    """Raise a ValueError where the backbone does not take images of the detector's sides, which are not square."""
    settings = detector.settings
    sides = padded(settings.min_size), padded(settings.max_size)
    try:
        with torch.no_grad():
            network = meta_copy(detector.bottom_up)
            network(example_images(network, 1, (3, *sides)))
    except Exception as error:  # a model may raise anything at a size that it cannot take
        raise ValueError(
            f"backbone {settings.backbone} cannot take images of {sides[0]} x {sides[1]} pixels ({error}); networks "
            'of one size often do with backbone_args such as {"dynamic_img_size": true}'
        ) from error


def load_backbone(detector: Detector, weights: Mapping[str, Tensor], source: str) -> str:
    """Load a classifier's weights into the backbone of a detector.

    Returns:
        The number of tensors that were loaded, and those that are missing or left over, in words.
    """
    missing, left_over = detector.bottom_up.body.model.load_state_dict(weights, strict=False)
    return (
        f"backbone {detector.settings.backbone}: {len(weights) - len(left_over)} of {len(weights)} tensors of {source}"
        f"; missing: {', '.join(missing) or 'none'}; left over: {', '.join(left_over) or 'none'}"
    )


def load_classifier(backbone: str, arguments: dict[str, Any]) -> nn.Module:
    """Load the timm model of a name or checkpoint, with its classifier."""
    name = timm_name(backbone)
    if name is not None:
        return timm.create_model(name, pretrained=name != backbone, **arguments)
    model = AutoModelForImageClassification.from_pretrained(backbone)
    network = timm_network(model)
    if network is None:
        raise ValueError(f"backbone {backbone!r} is a {type(model).__name__}; it must be a network of timm")
    return network


def padded(side: int) -> int:
    """Return the side in pixels to which a batch of images is padded."""
    return -(-side // SIZE_DIVISOR) * SIZE_DIVISOR


def _build_rcnn(backbone: Pyramid, settings: DetectorConfig) -> FasterRCNN:
    strides, channels = backbone.strides, settings.channels
    sizes = [settings.anchor_scale * stride for stride in (*strides, 2 * strides[-1])]
    box_roi_pool = _make_roi_pool(strides, output_size=7)
    num_classes = len(settings.categories) + 1
    parts = {
        "min_size": settings.min_size,
        "max_size": settings.max_size,
        "image_mean": list(settings.image_mean),
        "image_std": list(settings.image_std),
        "size_divisible": SIZE_DIVISOR,
        "rpn_anchor_generator": AnchorGenerator([(size,) for size in sizes], [ASPECT_RATIOS] * len(sizes)),
        "box_roi_pool": box_roi_pool,
        "box_head": TwoMLPHead(channels * box_roi_pool.output_size[0] ** 2, settings.box_head_size),
        "box_predictor": FastRCNNPredictor(settings.box_head_size, num_classes),
        "box_batch_size_per_image": settings.rois_per_image,
    }
    if not settings.has_masks:
        return FasterRCNN(backbone, **parts)
    return MaskRCNN(
        backbone,
        **parts,
        mask_roi_pool=_make_roi_pool(strides, output_size=14),
        mask_head=MaskRCNNHeads(channels, (channels,) * MASK_LAYERS, dilation=1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes),
    )


def _make_roi_pool(strides: Sequence[int], output_size: int) -> MultiScaleRoIAlign:
    """Make a pool that knows the strides, which it would else guess wrongly where the first images are small."""
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], output_size, sampling_ratio=2)
    side = strides[-1]
    features = {str(level): torch.zeros(1, 1, side // stride, side // stride) for level, stride in enumerate(strides)}
    pool(features, [torch.zeros(1, 4)], [(side, side)])
    return pool


def _read_settings(file: Path) -> DetectorConfig:
    content, names = read_json(file), {f.name for f in fields(DetectorConfig)}
    if not {"backbone", "categories"} <= set(content) <= names:
        raise ValueError(f"{file} is not that of a detector, which has {', '.join(sorted(names))}")
    return DetectorConfig(**content)


def _file_of(model: str, name: str) -> Path:
    if Path(model).is_dir():
        return Path(model) / name
    try:
        return Path(hf_hub_download(model, name))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"model is {model!r}, which is neither a folder nor on the Hub with a {name}: {error}"
        ) from error
