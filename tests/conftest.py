import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real data sets, named by the environment variable GRADAUG_TEST_DATA."""
    folder = os.environ.get("GRADAUG_TEST_DATA")
    if not folder:
        pytest.skip("GRADAUG_TEST_DATA does not name a folder of real data sets")
    return Path(folder)
