import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tests.helpers.hub_server import HubServer

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(autouse=True, scope="module")
def garbage_collection_is_quick() -> None:
    """The Trainer collects garbage at each start, which takes half a second if all modules are looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def signals_are_heard() -> None:
    """As in a terminal: a shell has what it runs in the background, and `nohup`, ignore some."""
    handlers = {
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    for number, handler in handlers.items():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def started_workers() -> Iterator[list[tuple[DataLoader, _MultiProcessingDataLoaderIter]]]:
    """The data loaders of this process that have started workers, each with the iterator that holds them."""
    started = []
    start = _MultiProcessingDataLoaderIter.__init__

    def remember(iterator: _MultiProcessingDataLoaderIter, loader: DataLoader) -> None:
        start(iterator, loader)
        started.append((loader, iterator))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_MultiProcessingDataLoaderIter, "__init__", remember)
        yield started


@pytest.fixture(autouse=True)
def workers_end_with_their_test(started_workers) -> Iterator[None]:
    """Tell the workers that a loader keeps to end; garbage collection closes queues first, and waits."""
    yield
    while started_workers:
        loader, iterator = started_workers.pop()
        iterator._shutdown_workers()
        if loader._iterator is iterator:
            loader._iterator = None


@pytest.fixture(autouse=True)
def threads_kept() -> Iterator[None]:
    """A recipe that takes all cores does so for its own test alone."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory) -> Iterator[HubServer]:
    """A Hub on loopback, to which the clients of this process talk as the user `me`, without waits between retries."""
    with HubServer({"hf_mine": "me", "hf_other": "other"}) as server:
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path_factory.mktemp("hub")),
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # new in transformers 5.10
        impatient = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
        yield server


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real data sets, named by the environment variable GRADAUG_TEST_DATA."""
    folder = os.environ.get("GRADAUG_TEST_DATA")
    if not folder:
        pytest.skip("GRADAUG_TEST_DATA does not name a folder of real data sets")
    return Path(folder)
