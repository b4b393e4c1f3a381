"""GradAug (NeurIPS 2020, arXiv 2006.07989) for timm and transformers image classifiers."""

from gradaug_hf import models  # noqa: F401  (registers the paper's networks in timm)
from gradaug_hf.objective.objective import GradAug
from gradaug_hf.objective.sampling import Subnet, SubnetSampler
from gradaug_hf.slimming import (
    SlicingReport,
    at_width,
    extract_subnet,
    make_slimmable,
    recalibrate_batchnorm,
    set_width,
    slicing_report,
)
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.trainer import GradAugTrainer

__version__ = "0.1.0"

__all__ = [
    "GradAug",
    "GradAugConfig",
    "GradAugTrainer",
    "SlicingReport",
    "Subnet",
    "SubnetSampler",
    "at_width",
    "extract_subnet",
    "make_slimmable",
    "recalibrate_batchnorm",
    "set_width",
    "slicing_report",
]
