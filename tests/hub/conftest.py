from collections.abc import Iterator

import pytest

from tests.helpers.elsewhere import Elsewhere


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Elsewhere]:
    """A process that cannot import gradaug_hf."""
    process = Elsewhere()
    yield process
    process.close()
