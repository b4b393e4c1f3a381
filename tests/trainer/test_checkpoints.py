import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import TrainerCallback

from gradaug_hf.trainer.checkpoints import CheckpointError
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
