"""GradAug (NeurIPS 2020, arXiv 2006.07989) for timm and transformers image classifiers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradaug_hf import models  # noqa: F401  (registers the paper's networks in timm)
from gradaug_hf.data.seeded import SeededDataset, SeededStream
from gradaug_hf.experiments.presets import preset_settings
from gradaug_hf.hub.subnet_folder import save_subnet
from gradaug_hf.objective.objective import GradAug
from gradaug_hf.objective.sampling import Subnet, SubnetSampler
from gradaug_hf.objective.transforms import RandomQuarterTurn
from gradaug_hf.reports.plots import SeenBatch, draw_batch
from gradaug_hf.slimming import (
    SlicingReport,
    at_width,
    extract_subnet,
    make_slimmable,
    recalibrate_batchnorm,
    register_layer,
    set_width,
    slicing_report,
)
from gradaug_hf.slimming.depth import make_droppable
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.metrics import topk_accuracy
from gradaug_hf.trainer.trainer import GradAugTrainer
from gradaug_hf.version import __version__

if TYPE_CHECKING:
    from gradaug_hf.data.loading import (
        balanced_subset,
        cifar_transform,
        class_names,
        imagenet_transform,
        load_digits_data,
        load_image_data,
        with_pixels,
    )

__all__ = [
    "GradAug",
    "GradAugConfig",
    "GradAugTrainer",
    "RandomQuarterTurn",
    "SeededDataset",
    "SeededStream",
    "SeenBatch",
    "SlicingReport",
    "Subnet",
    "SubnetSampler",
    "__version__",
    "at_width",
    "balanced_subset",
    "cifar_transform",
    "class_names",
    "draw_batch",
    "extract_subnet",
    "imagenet_transform",
    "load_digits_data",
    "load_image_data",
    "make_droppable",
    "make_slimmable",
    "preset_settings",
    "recalibrate_batchnorm",
    "register_layer",
    "save_subnet",
    "set_width",
    "slicing_report",
    "topk_accuracy",
    "with_pixels",
]


def __getattr__(name: str) -> Any:
    """Return a function of `gradaug_hf.data.loading`, whose library `datasets` training and slicing do not need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("gradaug_hf.data.loading"), name)


def __dir__() -> list[str]:
    """Return the public names, those not imported yet among them."""
    return sorted({*globals(), *__all__})
