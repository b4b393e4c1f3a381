"""Stop a training whose loss is not finite, without a device that waits for it."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradaug_hf.objective.sampling import Subnet
from gradaug_hf.trainer.checkpoints import describe_last


class NonFiniteLossError(ArithmeticError):
    """The loss is infinite or not a number."""


@contextmanager
def last_checkpoint_named(run_dir: Path) -> Iterator[None]:
    """Add to a NonFiniteLossError which checkpoint of a folder is the last."""
    try:
        yield
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{error}; {describe_last(run_dir)}") from error


@dataclass(frozen=True)
class _Losses:
    step: int
    values: Tensor
    subnets: Sequence[Subnet]
    copied: torch.Event | None

    def check(self) -> None:
        if not self.values.isfinite().all():
            full, *others = self.values.tolist()
            parts = [f"{loss:.4g} {_name(subnet)}" for loss, subnet in zip(others, self.subnets, strict=True)]
            raise NonFiniteLossError(
                f"the loss of step {self.step} is not finite: {', '.join([f'{full:.4g} of the full network', *parts])}"
            )


class LossWatch(TrainerCallback):
    """Look at the losses of each step as soon as they can be had.

    An accelerator runs behind the Python program, which `.item()` in every step would make wait for it. So losses are
    copied to the host behind the kernels that compute them, and looked at once the device has come that far: on a
    CPU at once, else a step or two later, when the step that went wrong is still known. The rest is waited for before
    losses are logged and the model is evaluated or saved, so that no checkpoint holds weights from after such a step.
    """

    def __init__(self) -> None:
        self._under_way: deque[_Losses] = deque()

    def add(self, step: int, losses: Sequence[Tensor], subnets: Sequence[Subnet] = ()) -> None:
        """Watch the losses of a batch; those that have arrived, of earlier steps too, raise a NonFiniteLossError."""
        values = torch.stack([loss.detach() for loss in losses])
        on_host = values.to("cpu", non_blocking=True)
        copied = None
        if values.device.type != "cpu":
            copied = torch.Event(values.device)
            copied.record()
        self._watch(step, on_host, subnets, copied)

    def _watch(self, step: int, values: Tensor, subnets: Sequence[Subnet], copied: torch.Event | None) -> None:
        self._under_way.append(_Losses(step, values, subnets, copied))
        while self._under_way and (self._under_way[0].copied is None or self._under_way[0].copied.query()):
            self._under_way.popleft().check()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget the losses of a training that was broken off."""
        self._under_way.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for all losses, if something comes after the step."""
        if control.should_log or control.should_evaluate or control.should_save:
            self.finish()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for all losses."""
        self.finish()

    def finish(self) -> None:
        """Wait for all losses, and raise a NonFiniteLossError if one is not finite."""
        while self._under_way:
            losses = self._under_way.popleft()
            if losses.copied is not None:
                losses.copied.synchronize()
            losses.check()


def _name(subnet: Subnet) -> str:
    side = "" if subnet.resolution is None else f" at {subnet.resolution} pixels"
    survival = "" if subnet.survival == 1 else f" with survival {subnet.survival:.4g}"
    return f"of width {subnet.width:.4g}{side}{survival}"
