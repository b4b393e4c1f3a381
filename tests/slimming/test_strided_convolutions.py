"""Slimmed convolutions against float64, under the instruction set of this processor and under AVX2 alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradaug_hf.utils.compat import cpu_capabilities

ROOT = Path(__file__).parents[2]
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
# A sum of n products is within n * 2^-24 of its terms: at most 4 images of 18 x 18 positions; 16 layers in a row.
TERMS, LAYERS = 4 * 18 * 18, 16
ROUNDING = TERMS * 2.0**-24


@pytest.fixture(scope="module", params=["avx2", "native"])
def errors(request) -> dict[str, dict[str, float] | str]:
    """What `strided_gradients.py` found."""
    if request.param == "native" and not cpu_capabilities().get("avx512_f"):
        pytest.skip("this processor has no AVX-512: its own instruction set is the other case")
    environment = {name: value for name, value in os.environ.items() if name not in AVX2}
    environment |= {"PYTHONPATH": str(ROOT)} | (AVX2 if request.param == "avx2" else {})
    script = Path(__file__).with_name("strided_gradients.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wrong(errors: dict[str, dict[str, float] | str], bound: float) -> dict[str, dict[str, float] | str]:
    return {name: found for name, found in errors.items() if isinstance(found, str) or not max(found.values()) < bound}


def test_values_and_gradients_of_slimmed_convolutions_are_those_of_float64(errors):
    convolutions = {name: found for name, found in errors.items() if "kernel" in name}
    assert len(convolutions) == 9
    assert wrong(convolutions, ROUNDING) == {}


def test_gradients_of_slimmed_channels_last_networks_are_those_of_float64(errors):
    networks = {name: found for name, found in errors.items() if "kernel" not in name}
    assert set(networks) == {"resnet18", "wrn16_2", "regnety_002", "convnext_atto"}
    assert wrong(networks, LAYERS * ROUNDING) == {}
