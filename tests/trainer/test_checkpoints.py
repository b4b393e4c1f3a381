import errno
import json
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from gradaug_hf.hub.weights import WeightsError
from gradaug_hf.trainer.checkpoints import CheckpointError, ResumeError, check_whole, read_state
from tests.helpers.small_training import checkpoints, make_trainer

# ---- a disk that is full ----


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more bytes than that to a file fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FillDisk(TrainerCallback):
    """Lets no file grow beyond a size from a step on."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.limit = step, files_of_at_most(size)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.limit.__enter__()


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("size", [100, 3000], ids=["weights", "optimiser"])
def test_a_full_disk_ends_in_a_clear_error_and_leaves_the_older_checkpoint(tmp_path, size):
    make_trainer(tmp_path, max_steps=2).train()
    before = content(tmp_path / "checkpoint-2")
    sizes = {name: len(data) for name, data in before.items()}
    assert 100 < sizes["model.safetensors"] < 3000 < sizes["optimizer.pt"]
    fill = FillDisk(3, size)
    trainer = make_trainer(tmp_path, [fill], max_steps=6, save_total_limit=1, ignore_config_change=True)
    message = rf"the checkpoint cannot be written to {tmp_path}, which has \d+ MiB free: .*; the last .*checkpoint-2"
    try:
        with pytest.raises(CheckpointError, match=message):
            trainer.train(resume_from_checkpoint=True)
    finally:
        fill.limit.__exit__(None, None, None)
    assert trainer.state.global_step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert content(tmp_path / "checkpoint-2") == before


def test_a_disk_that_fills_up_amid_the_small_files_leaves_nothing_half_written(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=4)

    def no_space(*args, **kwargs) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                monkeypatch.setattr(trainer.state, "save_to_json", no_space)

    trainer.add_callback(Fill())
    with pytest.raises(CheckpointError, match="No space left on device; the last checkpoint is .*checkpoint-2"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert checkpoints(tmp_path) == [2]


# ---- files of wrong types ----


class Marker:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


PROCESS = {"loss": 0.5, "total_loss": 1, "last_logged": 2, "means": {"loss_full": [1.5, "float32", 2]}}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Return the files that make a checkpoint whole."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": [{"loss": 1.0}]}))
    (folder / "gradaug_state.json").write_text(
        json.dumps({"settings": {"seed": 1}, "progress": {"seconds": 1.5, "processes": [PROCESS], "stream": [1, 2]}})
    )
    torch.save({"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}}, folder / "optimizer.pt")
    torch.save({"last_epoch": 1}, folder / "scheduler.pt")
    torch.save({"python": random.getstate(), "numpy": np.random.get_state()}, folder / "rng_state.pth")
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    return folder


def test_a_whole_checkpoint_is_accepted(checkpoint):
    check_whole(checkpoint)
    assert read_state(checkpoint)["progress"]["processes"] == [PROCESS]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", "long"),
        ("seconds", None),
        ("stream", 3),
        ("stream", ["a", 1]),
        ("stream", [1]),
        ("processes", {"loss": 1}),
        ("processes", [7]),
        ("processes", [PROCESS | {"loss": "low"}]),
        ("processes", [{"loss": 1.0}]),
        ("processes", [PROCESS | {"means": [1]}]),
        ("processes", [PROCESS | {"means": {"loss_full": [1, 2]}}]),
        ("processes", [PROCESS | {"means": {"loss_full": ["a", None, 1]}}]),
    ],
)
def test_progress_of_wrong_types_is_named_before_training(checkpoint, name, value):
    (checkpoint / "gradaug_state.json").write_text(json.dumps({"progress": {name: value}}))
    with pytest.raises(ResumeError, match=f"gradaug_state.json is damaged: progress has {name} .*; resume"):
        read_state(checkpoint)


@pytest.mark.parametrize("content", [{"progress": [1]}, {"settings": "none"}])
def test_a_state_without_values_by_name_is_named(checkpoint, content):
    (checkpoint / "gradaug_state.json").write_text(json.dumps(content))
    with pytest.raises(ResumeError, match="gradaug_state.json is damaged: settings and progress must be"):
        read_state(checkpoint)


@pytest.mark.parametrize("content", [{}, {"global_step": "two", "log_history": []}, {"global_step": 2}])
def test_a_trainer_state_of_wrong_types_is_named(checkpoint, content):
    (checkpoint / "trainer_state.json").write_text(json.dumps(content))
    with pytest.raises(ResumeError, match="trainer_state.json is damaged"):
        check_whole(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_named_and_not_run(checkpoint, tmp_path, name):
    torch.save({"state": Marker(tmp_path / "ran")}, checkpoint / name)
    with pytest.raises(WeightsError, match=rf"{name} holds \w+.mkdir beside tensors and plain values"):
        check_whole(checkpoint)
    assert not (tmp_path / "ran").exists()
