import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def threads_kept() -> Iterator[None]:
    """A recipe that takes all cores does so for its own test alone."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real data sets, named by the environment variable GRADAUG_TEST_DATA."""
    folder = os.environ.get("GRADAUG_TEST_DATA")
    if not folder:
        pytest.skip("GRADAUG_TEST_DATA does not name a folder of real data sets")
    return Path(folder)
