import psutil
import pytest
import torch
from accelerate import PartialState

from gradaug_hf.utils.threads import LAUNCHERS, use_all_cores


@pytest.mark.skipif(PartialState().device.type != "cpu", reason="cores are shared on machines without an accelerator")
@pytest.mark.parametrize(
    ("asked", "launched", "processes", "expected"),
    [
        (None, False, 1, 8),
        ("1", False, 1, 5),
        ("1", True, 1, 8),
        ("1", True, 4, 2),
        ("1", True, 16, 1),
        ("3", True, 1, 5),
    ],
)
def test_the_cores_are_shared_unless_a_number_of_threads_was_asked_for(
    monkeypatch, asked, launched, processes, expected
):
    torch.set_num_threads(5)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    for name in ("OMP_NUM_THREADS", *LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    use_all_cores()
    assert torch.get_num_threads() == expected
