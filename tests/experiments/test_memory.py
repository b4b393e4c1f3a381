import psutil
import pytest
import torch

from gradaug_hf.experiments import memory
from gradaug_hf.experiments.memory import PeakMemory

MEBIBYTE = 2**20


def resident_memory() -> float:
    """MiB that the process holds, without what earlier tests freed."""
    with PeakMemory(torch.device("cpu")) as peak:
        pass
    return peak.mebibytes


def test_peak_counts_memory_that_is_free_again():
    before = resident_memory()
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(300 * MEBIBYTE, dtype=torch.uint8)
    assert before + 250 < peak.mebibytes < before + 400


def test_what_earlier_work_freed_does_not_count():
    before = resident_memory()
    kept, freed = [], []
    for _ in range(4000):  # small enough that the C library keeps it in its heap, with something alive above
        freed.append(torch.ones(50_000, dtype=torch.uint8))
        kept.append(torch.ones(100, dtype=torch.uint8))
    freed.clear()
    assert psutil.Process().memory_info().rss / MEBIBYTE > before + 100
    with PeakMemory(torch.device("cpu")) as peak:
        pass
    assert peak.mebibytes < before + 50


def test_memory_is_measured_also_where_an_exception_ends_the_work():
    peak = PeakMemory(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="inside"), peak:
        raise RuntimeError("inside")
    assert peak.mebibytes > 10


def test_peak_of_the_whole_process_stands_in_where_the_system_keeps_no_record(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none")
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(300 * MEBIBYTE, dtype=torch.uint8)
    assert peak.mebibytes > 300
