"""SIGTERM and Ctrl-C: training ends after the step with a checkpoint, on all processes after the same one."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# A launcher passes on the Ctrl-C that its processes have from the terminal as well; a later one is meant.
REPEAT_SECONDS = 2.0
AFTER_LAST_STEP = "all steps are done; the process ends once the model is evaluated and the checkpoint written"


def ends_epoch(state: TrainerState) -> bool:
    """Return True if the step that is over was the last of an epoch or of the training."""
    return state.epoch == round(state.epoch) or state.global_step >= state.max_steps


class Interruption(TrainerCallback):
    """End a training on SIGTERM or Ctrl-C, with a checkpoint.

    Several processes agree on the step without waiting for their devices: each learns after a step what the others
    knew after the step before.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._lost_workers = False
        self._steps_are_left = True
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._group: dist.ProcessGroup | None = None
        self._work: dist.Work | None = None
        self._highest = torch.zeros((), dtype=torch.int64)

    @contextmanager
    def listening(self, args: TrainingArguments) -> Iterator[None]:
        """Receive the signals while the block runs; only the main thread can."""
        self.signal = self._received = None
        self._lost_workers, self._steps_are_left = False, True
        self._pid = os.getpid()
        self._is_first = args.process_index == 0
        child_handler = signal.getsignal(signal.SIGCHLD)
        signals = [signal.SIGINT] if args.enable_jit_checkpoint else [signal.SIGINT, signal.SIGTERM]
        previous = {}
        if threading.current_thread() is threading.main_thread():
            signals = [number for number in signals if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            previous = {number: signal.signal(number, self._receive) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self._received is not None:
                signal.signal(signal.SIGCHLD, child_handler)
            self._steps_are_left = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._receive_in_child(number)
            return
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = signal.Signals(number), now
            # The data loader's handler would raise an error amid a step, if its workers die of the same signal. Python
            # prints a traceback where a signal that has come already finds SIG_DFL instead of a function.
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
            if self._is_first:
                when = "training ends after this step" if self._steps_are_left else AFTER_LAST_STEP
                again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
                os.write(2, f"\n{self._received.name}: {when}{again}\n".encode())
        elif number == signal.SIGINT and now - self._received_at > REPEAT_SECONDS:
            signal.default_int_handler(number, frame)

    def _receive_in_child(self, number: int) -> None:
        """Leave a forked process, of a data loader for example, to the one that forked it."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def take_lost_workers(self) -> bool:
        """Return True if the workers of a data loader died from the signal that the whole process group received.

        Training then ends as after a step. One of several processes cannot do that alone.
        """
        self._lost_workers = self._received is not None and self._group is None
        return self._lost_workers

    # ---- during the training ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set up what the processes agree over."""
        self._work = None
        if args.world_size > 1 and dist.is_initialized() and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop with a checkpoint, if a signal has come."""
        self._steps_are_left = state.global_step < state.max_steps
        self._stop_if_received(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Neither log nor evaluate an epoch that is broken off as one that is over."""
        if not self._steps_are_left:
            self._stop_if_received(control)
        if self._lost_workers:
            self.signal = self._received
            control.should_training_stop = True
        if self._lost_workers or (self.signal is not None and not ends_epoch(state)):
            control.should_log = control.should_evaluate = False
            control.should_save = self._lost_workers and state.global_step > 0

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write a checkpoint, if a signal has come since the last step."""
        if not self._steps_are_left:
            self._stop_if_received(control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up a signal that came after the last step, and finish what is under way between the processes."""
        self._stop_if_received(control)
        if self._work is not None:
            self._stop_if_received(control)
            self._work.wait()
            self._work = None

    def _stop_if_received(self, control: TrainerControl) -> None:
        number = self._agreed() if self._group is not None else self._received
        if number:
            self.signal = signal.Signals(number)
            control.should_training_stop = True
            control.should_save = True

    def _agreed(self) -> int:
        """Return the signal that any process had after the step before; 0 if none."""
        number = 0
        if self._work is not None:
            self._work.wait()
            number = int(self._highest)
        self._highest = torch.tensor(int(self._received or 0))
        self._work = dist.all_reduce(self._highest, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return number

    # ---- after the training ----

    def end_process(self, state: TrainerState, last_checkpoint: str, to_go_on: str) -> None:
        """Do what the signal would have done, if one has ended the training.

        Args:
            state: of the training.
            last_checkpoint: sentence on the last checkpoint.
            to_go_on: what resumes the training from it.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM, with the status that shells give.
        """
        if self.signal is None:
            return
        if self._is_first:
            message = (
                f"{self.signal.name}: training stopped after step {state.global_step} of {state.max_steps}, and "
                f"{last_checkpoint}. To go on: {to_go_on}"
            )
            print(f"\n{message}", file=sys.stderr, flush=True)
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)
