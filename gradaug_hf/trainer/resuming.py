"""Resuming: an interrupted training, once resumed, ends as if it had not been interrupted."""

import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType, get_last_checkpoint, has_length

from gradaug_hf.data.streaming import ShardedStream
from gradaug_hf.hub.configs import label_names
from gradaug_hf.hub.weights import check_weights
from gradaug_hf.trainer import sharding
from gradaug_hf.trainer.checkpoints import (
    CLASS_NAMES,
    ResumeError,
    as_resume_errors,
    check_settings,
    check_whole,
    read_state,
    settings_of_training,
    write_state,
)
from gradaug_hf.trainer.running_means import RunningMeans
from gradaug_hf.trainer.subnets import TrainingSubnets
from gradaug_hf.utils.randomness import random_states_kept


@as_resume_errors()
def checkpoint_to_resume(trainer: Trainer, given: str | bool | None) -> str | None:
    """Return the folder of the checkpoint that a training goes on from, or None.

    Args:
        trainer: a GradAugTrainer.
        given: a folder; True: the last checkpoint in `args.output_dir`; None or False: none.
    """
    args, model = trainer.args, trainer.model
    folder = get_last_checkpoint(args.output_dir) if given is True else given or None
    if given is True and folder is None:
        raise ResumeError(f"resume_from_checkpoint is True, but {args.output_dir} holds no checkpoint")
    if folder is None:
        return None
    own_files = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # which are not looked into
    if not own_files:
        check_whole(Path(folder))
    if not args.ignore_config_change:
        check_settings(Path(folder), trainer.settings(), has_fixed_schedule(trainer))
    if not own_files and args.num_subnets > 0:  # else the Trainer, or the model's own load_state_dict, judges
        prefix = getattr(model, "base_model_prefix", "")  # a timm model is saved without its wrapper's
        check_weights(Path(folder), model, f"{prefix}." if prefix else "")
    if sharding.is_sharded(trainer.accelerator):
        sharding.check_parts(Path(folder), trainer.accelerator)
    return folder


def has_fixed_schedule(trainer: Trainer) -> bool:
    """Return True if neither the learning rate of a step nor its KL weight depends on the number of steps."""
    args = trainer.args
    is_constant = args.lr_scheduler_type in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
    is_own = type(trainer).create_scheduler is not Trainer.create_scheduler or trainer.lr_scheduler is not None
    has_share = 0 < args.warmup_steps < 1 or args.kl_warmup > 0  # of the steps
    return is_constant and not is_own and not has_share


def dataset_fingerprint(dataset: Any) -> str | None:
    """Return the length of a dataset and, unless it is a stream, a hash of some of its labels; None if it has none.

    The images are left out: their augmentation, and how they are decoded, may differ from machine to machine.
    """
    if dataset is None or not has_length(dataset):
        return None
    if isinstance(dataset, IterableDataset):
        return f"{len(dataset)} examples"
    last = len(dataset) - 1
    with random_states_kept():
        examples = [dataset[index] for index in sorted({round(last * part / 4) for part in range(5)}) if last >= 0]
    labels = [str(_label(example)) for example in examples]
    return f"{last + 1} examples with labels {zlib.crc32(repr(labels).encode()):08x}"


def _label(example: Any) -> Any:
    if isinstance(example, Mapping):
        label = next((example[name] for name in ("labels", "label") if name in example), None)
    else:
        label = example[-1] if isinstance(example, tuple) and example else None
    return label.tolist() if isinstance(label, (Tensor, np.generic, np.ndarray)) else label


class ProgressCallback(TrainerCallback):
    """Keep the sums of the next log, the time and the place in a stream, which the Trainer's checkpoints lack."""

    def __init__(self, trainer: Trainer) -> None:
        self.means = RunningMeans()
        self._trainer = trainer
        self._stored: dict[str, Any] = {}
        self._epoch_is_over = False
        self._started = time.perf_counter()
        self._first_step = 0  # from which the Trainer's sum of losses counts
        self._fingerprint: str | None = None  # of the training set

    def begin(self, given: str | bool | None) -> str | None:
        """Begin a training, from the progress that a checkpoint holds or anew, and return the checkpoint's folder."""
        self._fingerprint = dataset_fingerprint(self._trainer.train_dataset)
        folder = checkpoint_to_resume(self._trainer, given)
        self._stored = {} if folder is None else read_state(Path(folder))["progress"]
        return folder

    def settings(self, subnets: TrainingSubnets) -> dict[str, Any]:
        """Return the settings that have to be the same when the training is resumed, by name."""
        own = {
            "subnet_sampler": subnets.given_sampler,
            "subnet_transform": subnets.transform,
            "teacher": subnets.teacher,
        }
        kinds = {name: None if value is None else type(value).__name__ for name, value in own.items()}
        names = label_names(nn.Identity(), self._trainer.train_dataset)
        data = {"train_dataset": self._fingerprint} | ({CLASS_NAMES: names} if names else {})
        return settings_of_training(self._trainer.args) | kinds | data

    def complete_log(self, logs: dict[str, float]) -> None:
        """Add the means of the losses and the sub-networks to a log, or make its `train_loss` that of all steps."""
        trainer = self._trainer
        if "loss" in logs:
            for name, mean in self.means.take().items():
                logs[name] = trainer.accelerator.reduce(mean, "mean").item() if isinstance(mean, Tensor) else mean
        if "train_loss" in logs:
            logs["train_loss"] = trainer._total_loss_scalar / max(trainer.state.global_step - self._first_step, 0.001)

    def seconds(self) -> float:
        """Return the seconds that the training has taken, with those before the checkpoint it was resumed from."""
        return self._stored.get("seconds", 0.0) + time.perf_counter() - self._started

    # ---- where a resumed training goes on ----

    def place(self, epoch: int, batches: int) -> tuple[int, int]:
        """Return the epoch to go on in and its batches to leave out; the Trainer takes a stream for one epoch."""
        state, args = self._trainer.state, self._trainer.args
        if "stream" in self._stored:
            epoch, batches = self._stored["stream"]
            state.epoch = max(state.epoch, float(epoch))
        if state.global_step >= state.max_steps:  # amid an epoch, of which the Trainer would do a further step
            epoch = state.num_train_epochs
        batches = 0 if args.ignore_data_skip else batches
        if isinstance(self._trainer.train_dataset, ShardedStream):
            self._trainer.train_dataset.skip(epoch, batches)
        return epoch, batches

    def start_workers_aside(self, loader: DataLoader, was_started: bool) -> DataLoader:
        """Start the workers of a data loader without the global random number that each start takes, if it was taken.

        That is where they had been started before the checkpoint that the training was resumed from.
        """
        base = getattr(loader, "base_dataloader", loader)  # accelerate has wrapped it, unless it was told not to
        if self._stored and was_started and base.persistent_workers and base.generator is None:
            base.generator = torch.Generator()
            base.generator.seed()
        return loader

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Go on with the sums of the checkpoint, now that the Trainer has set its own to zero."""
        self._started, self.means = time.perf_counter(), RunningMeans()
        processes = self._stored.get("processes", [])
        self._first_step = 0 if processes else state.global_step
        if not processes:
            return
        own = processes[args.process_index] if len(processes) == args.world_size else _mean_of(processes)
        self._trainer._tr_loss.fill_(own["loss"])
        self._trainer._total_loss_scalar = own["total_loss"]
        self._trainer._globalstep_last_logged = own["last_logged"]
        self.means.load(own["means"], args.device)

    # ---- what a checkpoint holds ----

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note that an epoch is under way."""
        self._epoch_is_over = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note that a checkpoint written now is of the beginning of the next epoch."""
        self._epoch_is_over = True

    def complete_checkpoint(self, checkpoint: Path, settings: Mapping[str, Any]) -> None:
        """Write settings and progress into a checkpoint of the Trainer; on all processes."""
        trainer = self._trainer
        sums = {
            "loss": trainer._tr_loss.item(),
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "means": self.means.state(),
        }
        processes = gather_object([sums])
        if trainer.args.should_save:
            trainer.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
            progress = {"seconds": trainer.training_seconds(), "processes": processes, **self._place_in_stream()}
            write_state(checkpoint, settings, progress)

    def _place_in_stream(self) -> dict[str, tuple[int, int]]:
        """Return the epoch of a training set without length, and the batches of it that were trained on."""
        trainer = self._trainer
        if has_length(trainer.callback_handler.train_dataloader):
            return {}
        epoch = int(trainer.state.epoch)
        if self._epoch_is_over:
            return {"stream": (epoch + 1, 0)}
        steps = (trainer.state.epoch - epoch) * trainer.state.max_steps
        return {"stream": (epoch, round(steps * trainer.args.gradient_accumulation_steps))}


def _mean_of(processes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums that each of another number of processes goes on with, so that their mean is what it was."""
    first, count = processes[0], len(processes)
    means = {
        name: [sum(each["means"][name][0] for each in processes) / count, dtype, number]
        for name, (_, dtype, number) in first["means"].items()
    }
    return {**first, "loss": sum(each["loss"] for each in processes) / count, "means": means}
