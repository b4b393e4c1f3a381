"""Compile a model for slicing: tie channels by tracing, plan what is sliced, and prove it by running it."""

import gradaug_hf.slimming.analysis.layer_handlers  # noqa: F401 (registers its handlers)
