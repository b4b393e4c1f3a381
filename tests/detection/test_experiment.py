import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from gradaug_hf.detection.experiment import run, train


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """The steps of a run, in their order, which do nothing."""
    done = []
    results = {"make_trainer": Mock(), "train": {}, "evaluate": {"box_AP": 0.5}, "precision_table": ""}
    for name in (*results, "write", "leave_group"):
        monkeypatch.setattr(
            f"gradaug_hf.detection.experiment.{name}", lambda *_, name=name: done.append(name) or results.get(name)
        )
    return done


def flags(folder: Path) -> list[str]:
    return ["--coco_dir", str(folder), "--use_cpu", "--output_dir", str(folder / "out")]


def test_processes_leave_their_group_once_all_is_written(done, tmp_path):
    run(flags(tmp_path))
    assert done == ["make_trainer", "train", "evaluate", "write", "precision_table", "leave_group"]


def test_a_token_is_taken_out_of_the_command_line(done, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coco_maskrcnn.py", *flags(tmp_path), "--hub_token", "secret"])
    run()
    assert "secret" not in sys.argv and sys.argv[-2:] == ["--hub_token", "<HUB_TOKEN>"]


def test_the_seconds_of_a_training_are_those_before_it_was_resumed_too():
    trainer = Mock(training_seconds=lambda: 12.5, state=Mock(global_step=3))
    trainer.args.device = torch.device("cpu")
    assert train(trainer) | {"peak_memory": None} == {"steps": 3, "seconds": 12.5, "peak_memory": None}
