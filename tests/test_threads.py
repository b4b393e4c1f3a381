import psutil
import pytest
import torch
from accelerate import PartialState

from gradaug_hf.threads import use_all_cores


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(PartialState().device.type != "cpu", reason="cores are shared on machines without an accelerator")
@pytest.mark.parametrize(
    ("asked", "processes", "expected"), [(None, 1, 8), ("1", 1, 8), ("1", 4, 2), ("1", 16, 1), ("3", 1, 5)]
)
def test_the_cores_are_shared_unless_a_number_of_threads_was_asked_for(monkeypatch, asked, processes, expected):
    torch.set_num_threads(5)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    use_all_cores()
    assert torch.get_num_threads() == expected
