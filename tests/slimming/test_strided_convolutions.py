"""Slimmed convolutions against float64, under the instruction set of this processor and under AVX2 alone."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from gradaug_hf.utils.compat import cpu_capabilities
from tests.slimming.strided_gradients import CONVOLUTIONS, NETWORKS, convolution_errors, in_child, network_errors

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
# A sum of n products is within n * 2^-24 of its terms: at most 4 images of 18 x 18 positions; 16 layers in a row.
TERMS, LAYERS = 4 * 18 * 18, 16
ROUNDING = TERMS * 2.0**-24


@pytest.fixture(scope="module", params=["avx2", "native"])
def processor(request) -> Iterator[ProcessPoolExecutor]:
    """A process with an instruction set, which forks another one for each case, so that a crash is one's own."""
    if request.param == "native" and not cpu_capabilities().get("avx512_f"):
        pytest.skip("this processor has no AVX-512: its own instruction set is the other case")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in AVX2.items():
                patch.delenv(name, raising=False)
                if request.param == "avx2":
                    patch.setenv(name, value)
            assert pool.submit(in_child, dict).result() == {}  # starts the process, and imports what the cases need
        yield pool


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: f"{case[0].__name__}{case[1]}")
def test_values_and_gradients_of_slimmed_convolutions_are_those_of_float64(processor, case):
    errors = processor.submit(in_child, convolution_errors, *case).result()
    assert not isinstance(errors, str), errors
    assert max(errors.values()) < ROUNDING


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_slimmed_channels_last_networks_are_those_of_float64(processor, name):
    errors = processor.submit(in_child, network_errors, name).result()
    assert not isinstance(errors, str), errors
    assert max(errors.values()) < LAYERS * ROUNDING
