"""GradAug (NeurIPS 2020, arXiv 2006.07989) for timm and transformers image classifiers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradaug_hf import models  # noqa: F401  (registers the paper's networks in timm)
from gradaug_hf.data.seeded import SeededDataset, SeededStream
from gradaug_hf.data.transforms import cifar_transform, imagenet_transform
from gradaug_hf.experiments.presets import preset_settings
from gradaug_hf.hub.subnet_folder import save_subnet
from gradaug_hf.objective.objective import GradAug
from gradaug_hf.objective.sampling import Subnet, SubnetSampler
from gradaug_hf.objective.transforms import RandomQuarterTurn
from gradaug_hf.slimming import (
    SlicingReport,
    at_width,
    extract_subnet,
    make_slimmable,
    recalibrate_batchnorm,
    register_layer,
    set_width,
    slicing_report,
    unpatch,
)
from gradaug_hf.slimming.depth import make_droppable
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.metrics import mean_average_precision, topk_accuracy
from gradaug_hf.trainer.trainer import GradAugTrainer
from gradaug_hf.version import __version__

if TYPE_CHECKING:
    from gradaug_hf.data.decoding import with_pixels
    from gradaug_hf.data.digits import load_digits_data
    from gradaug_hf.data.loading import balanced_subset, class_names, load_image_data

__all__ = [
    "GradAug",
    "GradAugConfig",
    "GradAugTrainer",
    "RandomQuarterTurn",
    "SeededDataset",
    "SeededStream",
    "SlicingReport",
    "Subnet",
    "SubnetSampler",
    "__version__",
    "at_width",
    "balanced_subset",
    "cifar_transform",
    "class_names",
    "extract_subnet",
    "imagenet_transform",
    "load_digits_data",
    "load_image_data",
    "make_droppable",
    "make_slimmable",
    "mean_average_precision",
    "preset_settings",
    "recalibrate_batchnorm",
    "register_layer",
    "save_subnet",
    "set_width",
    "slicing_report",
    "topk_accuracy",
    "unpatch",
    "with_pixels",
]


# Modules of names that are imported when they are used: training and slicing do not need the library `datasets`.
_LATER = {
    "balanced_subset": "gradaug_hf.data.loading",
    "class_names": "gradaug_hf.data.loading",
    "load_digits_data": "gradaug_hf.data.digits",
    "load_image_data": "gradaug_hf.data.loading",
    "with_pixels": "gradaug_hf.data.decoding",
}


def __getattr__(name: str) -> Any:
    """Return a public name whose module is imported now."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    """Return the public names, those not imported yet among them."""
    return sorted({*globals(), *__all__})
