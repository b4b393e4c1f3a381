import psutil
import pytest
import torch
from torch import nn

from gradaug_hf import GradAugConfig
from gradaug_hf.experiments import memory
from gradaug_hf.experiments.memory import PeakMemory, check_memory, memory_of_step

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


def test_a_step_takes_weights_gradients_momentum_and_what_its_backward_needs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5, bias=False))
    images, features = 3 * 8 * 8, 4 * 6 * 6  # the ReLU keeps its output, which is the input of the last layer
    weights = 4 * 3 * 9 + 5 * features
    assert memory_of_step(model, batch=7, side=8) == 4 * (3 * weights + 7 * (images + features))


def test_a_step_that_the_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 5))
    config = GradAugConfig(str(tmp_path), use_cpu=True)
    check_memory(model, 8, 32, config)
    message = (
        r"a step on 100000000 images of 32 pixels takes at least \d+\.\d GiB, and .* GiB are available; give a larger"
    )
    with pytest.raises(ValueError, match=message):
        check_memory(model, 100_000_000, 32, config)


def test_a_model_that_cannot_run_without_values_is_not_measured(tmp_path):
    class ByValue(nn.Module):
        def forward(self, images):
            return images if images.mean().item() > 0 else -images

    check_memory(ByValue(), 8, 32, GradAugConfig(str(tmp_path), use_cpu=True))
