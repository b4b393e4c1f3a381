"""Slice the width of models at run time (slimmable networks, arXiv 1903.05134), with an unchanged state dict."""

from gradaug_hf.slimming.analysis.tracing import register_layer
from gradaug_hf.slimming.calibration import recalibrate_batchnorm
from gradaug_hf.slimming.extraction import extract_subnet
from gradaug_hf.slimming.meta import meta_copy
from gradaug_hf.slimming.patching import unpatch
from gradaug_hf.slimming.report import SlicingReport
from gradaug_hf.slimming.slimmable import make_slimmable, slicing_report
from gradaug_hf.slimming.widths import at_width, set_width, subnet_pass

__all__ = [
    "SlicingReport",
    "at_width",
    "extract_subnet",
    "make_slimmable",
    "meta_copy",
    "recalibrate_batchnorm",
    "register_layer",
    "set_width",
    "slicing_report",
    "subnet_pass",
    "unpatch",
]
