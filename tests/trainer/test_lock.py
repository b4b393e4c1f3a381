import errno
import os
import re
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from gradaug_hf.trainer.checkpoints import CheckpointError
from gradaug_hf.trainer.lock import LOCK, locked
from tests.helpers.small_training import checkpoints, make_trainer, start


@pytest.fixture
def holder(tmp_path) -> Iterator[int]:
    """A process that trains in the folder, with a worker that it has forked."""

    def hold() -> None:
        with locked(tmp_path):
            worker = start(signal.pause)
            (tmp_path / "worker").write_text(f"{worker}\n")
            signal.pause()

    pid = start(hold)
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text().endswith("\n"):
        time.sleep(0.01)
    yield pid
    for each in (int((tmp_path / "worker").read_text()), pid):
        os.kill(each, signal.SIGKILL)


def test_a_second_training_in_a_folder_is_refused_and_leaves_it_as_it_is(tmp_path, holder):
    partial = tmp_path / "_tmp-checkpoint" / "checkpoint-1"  # that the first is writing
    partial.mkdir(parents=True)
    message = f"output_dir is '{tmp_path}', where process {holder} on {socket.gethostname()} is training; give another"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        make_trainer(tmp_path, max_steps=1).train()
    assert partial.exists()
    assert checkpoints(tmp_path) == []


def test_what_a_killed_training_had_begun_to_write_is_removed(tmp_path):
    partial = tmp_path / "_tmp-checkpoint" / "checkpoint-1"
    partial.mkdir(parents=True)
    with locked(tmp_path):
        assert not partial.parent.exists()


def test_the_lock_of_a_killed_training_is_taken_over_though_its_workers_live(tmp_path, holder):
    os.kill(holder, signal.SIGKILL)
    assert os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT).si_status == signal.SIGKILL
    assert (tmp_path / LOCK).read_text() == f"{socket.gethostname()} {holder}\n"
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{socket.gethostname()} {os.getpid()}\n"


def test_a_folder_is_free_after_a_training(tmp_path):
    with locked(tmp_path / "new"):
        assert [file.name for file in (tmp_path / "new").iterdir()] == [LOCK]
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def no_lock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_lock)
    with (
        pytest.warns(UserWarning, match="lies on a file system without locks .* make sure that there is none"),
        locked(tmp_path),
    ):
        pass
