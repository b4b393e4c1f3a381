import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info
from transformers import TrainerCallback

from tests.helpers.small_training import (
    END,
    Sends,
    Slow,
    checkpoints,
    make_trainer,
    start,
    start_ranks,
    status_of,
    train,
    wait_for_step,
)

SETTINGS = {"max_steps": 14, "save_strategy": "no", "dataloader_num_workers": 2}


def end(folder: Path) -> dict:
    return json.loads((folder / END).read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The end of a training that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert status_of(start(lambda: train(folder, **SETTINGS))) == 0
    return end(folder)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_with_a_checkpoint_from_which_it_goes_on(tmp_path, capfd, whole, number, status):
    folder = tmp_path / "interrupted"
    pid = start(lambda: train(folder, [Slow(folder)], **SETTINGS))
    wait_for_step(folder, 3)
    os.kill(pid, number)
    assert status_of(pid) == status
    (step,) = checkpoints(folder)
    assert 3 <= step < 14
    printed = capfd.readouterr().err
    assert f"{number.name}: training ends after this step" in printed
    assert f"{number.name}: training stopped after step {step} of 14, and the last checkpoint is {folder}" in printed
    assert "To go on: trainer.train(resume_from_checkpoint=True)" in printed

    assert status_of(start(lambda: train(folder, **SETTINGS))) == 0
    assert end(folder) == whole


class SlowlyRead(Dataset):
    """By workers so slowly that training waits for them most of the time."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        if get_worker_info() is not None:
            time.sleep(0.2)
        return self.dataset[index]


def test_a_signal_to_the_workers_too_ends_training_with_a_checkpoint(tmp_path, whole):
    def train_in_a_group() -> None:
        os.setpgrp()
        trainer = make_trainer(tmp_path, [Slow(tmp_path)], **SETTINGS)
        trainer.train_dataset.dataset = SlowlyRead(trainer.train_dataset.dataset)
        trainer.train()

    pid = start(train_in_a_group)
    wait_for_step(tmp_path, 2)
    time.sleep(0.5)
    os.killpg(pid, signal.SIGTERM)
    assert status_of(pid) == 143
    (step,) = checkpoints(tmp_path)
    assert 2 <= step < 14
    assert status_of(start(lambda: train(tmp_path, **SETTINGS))) == 0
    assert end(tmp_path) == whole


@pytest.mark.parametrize("step", [3, 5, 9])
def test_a_training_interrupted_amid_or_after_an_epoch_logs_and_evaluates_as_one_that_was_not(tmp_path, step):
    torch.set_num_threads(1)  # as the processes that `start` forks have; sums are rounded by the number of threads
    settings = {"max_steps": 9, "save_strategy": "no", "logging_strategy": "epoch"}  # 5 steps an epoch
    trainer = make_trainer(tmp_path, [Sends(signal.SIGINT, step)], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoints(tmp_path) == [step]
    assert status_of(start(lambda: train(tmp_path / "whole", **settings))) == 0
    assert status_of(start(lambda: train(tmp_path, **settings))) == 0
    assert end(tmp_path) == end(tmp_path / "whole")


class SendsWhenEvaluated(Sends):
    """Sends a signal while the model is evaluated, after a step."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Send nothing yet."""

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        super().on_step_end(args, state, control, **kwargs)


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_signal_after_the_last_step_ends_the_process_once_the_checkpoint_is_written(tmp_path, capfd, evaluated):
    class SendsAtTheEnd(Sends):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            """Send nothing yet."""

        def on_epoch_end(self, args, state, control, **kwargs) -> None:
            super().on_step_end(args, state, control, **kwargs)

    settings = {"max_steps": 3, "save_strategy": "no", "eval_strategy": "epoch" if evaluated else "no"}
    sender = (SendsWhenEvaluated if evaluated else SendsAtTheEnd)(signal.SIGTERM, 3)
    with pytest.raises(SystemExit, match="143"):
        make_trainer(tmp_path, [sender], **settings).train()
    assert checkpoints(tmp_path) == [3]
    printed = capfd.readouterr().err
    assert "SIGTERM: all steps are done; the process ends once the model is evaluated" in printed
    assert "training ends after this step" not in printed
    assert "SIGTERM: training stopped after step 3 of 3" in printed


def test_workers_that_die_with_the_signal_print_no_traceback(tmp_path, monkeypatch):
    errors = []
    monkeypatch.setattr("sys.unraisablehook", errors.append)
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)  # as a data loader's

    class SendsBoth(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            both = (signal.SIGINT, signal.SIGCHLD)
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            for number in both:
                os.kill(os.getpid(), number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)

    try:
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, [SendsBoth()], max_steps=2, eval_strategy="no").train()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert errors == []


def test_handlers_come_back_and_others_are_left_alone(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

    make_trainer(tmp_path, [Look()], max_steps=1).train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert seen[0] not in before

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as of a command that ignores it, started by nohup for example
    try:
        make_trainer(tmp_path, [Look()], max_steps=1).train()
    finally:
        signal.signal(signal.SIGTERM, before[0])
    assert seen[1] == signal.SIG_IGN


def test_training_in_another_thread_than_the_main_one_is_possible(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


def test_a_signal_to_one_of_two_processes_ends_both_after_the_same_step(tmp_path):
    settings = {**SETTINGS, "max_steps": 40, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    pids = start_ranks(lambda: train(tmp_path, [Slow(tmp_path)], **settings))
    wait_for_step(tmp_path, 3)
    os.kill(pids[1], signal.SIGTERM)
    assert [status_of(pid) for pid in pids] == [143, 143]
    (step,) = checkpoints(tmp_path)
    assert 3 <= step < 40
    state = json.loads((tmp_path / f"checkpoint-{step}" / "gradaug_state.json").read_text())
    assert len(state["progress"]["processes"]) == 2
    assert sorted(path.name for path in (tmp_path / f"checkpoint-{step}").glob("rng_state_*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    for folder in (tmp_path, tmp_path / "whole"):
        pids = start_ranks(lambda folder=folder: train(folder, **settings))
        assert [status_of(pid) for pid in pids] == [0, 0]
    assert end(tmp_path) == end(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Stuck(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                (tmp_path / "steps").write_text("2")
                time.sleep(600)

    pid = start(lambda: train(tmp_path, [Stuck()], **SETTINGS))
    wait_for_step(tmp_path, 2)
    os.kill(pid, signal.SIGINT)
    time.sleep(2.5)
    os.kill(pid, signal.SIGINT)
    assert status_of(pid) == 130
    assert checkpoints(tmp_path) == []
