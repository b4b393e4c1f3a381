"""ResumableTrainer: an interrupted training, once resumed, ends as if it had not been interrupted."""

import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    TrainOutput,
    get_last_checkpoint,
    has_length,
    rotate_checkpoints,
)

from gradaug_hf.data.seeded import EpochCallback
from gradaug_hf.trainer.checkpoints import (
    ResumeError,
    check_settings,
    check_weights,
    check_whole,
    describe_last,
    put_in_place,
    read_state,
    remove_partial,
    settings_of_training,
    write_state,
    written_whole,
)
from gradaug_hf.trainer.interruption import Interruption, ends_epoch
from gradaug_hf.trainer.loss_watch import LossWatch, NonFiniteLossError
from gradaug_hf.trainer.metrics import RunningMeans


class ResumableTrainer(Trainer):
    """`transformers.Trainer` that can be killed at any time.

    Checkpoints are written whole or not at all, and hold what the Trainer's lack: the sums of what is logged next, and
    the settings, with which a training that is resumed has to agree. SIGTERM and Ctrl-C end a training with a
    checkpoint, a loss that is not finite without one.

    Args:
        args: positional arguments of `transformers.Trainer`.
        kwargs: keyword arguments of `transformers.Trainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._means = RunningMeans()
        self._loss_watch = LossWatch()
        self._interruption = Interruption()
        self._partial_folder: Path | None = None
        self._epoch_is_over = False
        self._progress: dict[str, Any] = {}  # that of the checkpoint which training goes on from
        super().__init__(*args, **kwargs)
        for callback in (EpochCallback(), self._interruption, _LastStep(), _Progress(self)):
            self.add_callback(callback)

    def settings(self) -> dict[str, Any]:
        """What has to be the same when a training is resumed."""
        return settings_of_training(self.args)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`, interrupted by SIGTERM and Ctrl-C with a checkpoint.

        Args:
            resume_from_checkpoint: folder of a checkpoint; True: the last one in `args.output_dir`.
            args: further positional arguments of `Trainer.train`.
            kwargs: further keyword arguments of `Trainer.train`.

        Raises:
            ResumeError: the checkpoint cannot be read, is of another network, or was trained with other settings.
            NonFiniteLossError: the loss is not finite.
            CheckpointError: a checkpoint cannot be written.
            KeyboardInterrupt: after Ctrl-C, once the checkpoint is written; SIGTERM ends the process with status 143.
        """
        folder = self._checkpoint_to_resume(resume_from_checkpoint)
        self._means, self._loss_watch = RunningMeans(), LossWatch()
        if self.args.should_save:
            remove_partial(Path(self.args.output_dir))
        try:
            with self._interruption.listening(self.args):
                output = super().train(folder, *args, **kwargs)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{error}; {describe_last(Path(self.args.output_dir))}") from error
        self._interruption.end_process(
            f"training stopped after step {self.state.global_step} of {self.state.max_steps}, and "
            f"{describe_last(Path(self.args.output_dir))}. To go on: trainer.train(resume_from_checkpoint=True), or a "
            "recipe's command line with --resume_from_checkpoint last"
        )
        return output._replace(training_loss=output.metrics["train_loss"])

    def _checkpoint_to_resume(self, given: str | bool | None) -> str | None:
        folder = get_last_checkpoint(self.args.output_dir) if given is True else given or None
        if given is True and folder is None:
            raise ResumeError(f"resume_from_checkpoint is True, but {self.args.output_dir} holds no checkpoint")
        self._progress = {}
        if folder is None:
            return None
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # they have files of their own
            check_whole(Path(folder))
        if not getattr(self.args, "ignore_config_change", False):
            check_settings(Path(folder), self.settings())
        self._progress = read_state(Path(folder))["progress"]
        return folder

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        network = self.model if model is None else model
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            prefix = getattr(network, "base_model_prefix", "")  # a network of timm is saved without its wrapper's
            check_weights(Path(resume_from_checkpoint), network, f"{prefix}." if prefix else "")
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        was_evaluated = any(key.startswith("eval_") for entry in self.state.log_history for key in entry)
        if self._progress and self.args.dataloader_persistent_workers and (is_training or was_evaluated):
            # Workers that are kept took one global random number when they were started, before the checkpoint.
            loader.base_dataloader.generator = torch.Generator()
            loader.base_dataloader.generator.seed()
        return loader

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(*args, **kwargs)
        if "stream" in self._progress:  # the Trainer takes all its epochs for one
            epoch, batches = self._progress["stream"]
            self.state.epoch = max(self.state.epoch, float(epoch))
        return epoch, 0 if self.args.ignore_data_skip else batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # After a checkpoint of the last step, amid an epoch, the Trainer would do one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """`Trainer.get_batch_samples`; nothing more if a signal that ends the training has ended the workers."""
        try:
            return super().get_batch_samples(*args, **kwargs)
        except RuntimeError:
            if not self._interruption.take_lost_workers():
                raise
            return [], None

    # ---- writing ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._loss_watch.finish()
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        push, self.args.push_to_hub = self.args.push_to_hub, False  # what is pushed has to stay in its place
        try:
            with written_whole(run_dir) as folder:
                self._partial_folder = folder
                super()._save_checkpoint(model, trial)
                self._complete_checkpoint(folder / name, run_dir / name)
        finally:
            self._partial_folder = None
            self.args.push_to_hub = push
        if push:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best, use_mtime=True)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial_folder is None else str(self._partial_folder)

    def _complete_checkpoint(self, checkpoint: Path, place: Path) -> None:
        """Write what the Trainer does not, and put the checkpoint in its place, once for all that share it."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(place)
        progress = gather_object([self._progress_of_process()])
        if self.args.should_save:
            self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
            write_state(
                checkpoint,
                self.settings(),
                {"seconds": self.training_seconds(), "processes": progress, **self._place_in_stream()},
            )
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            put_in_place(checkpoint, place)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and checkpoint.exists():  # on a machine that does not share the folder
            put_in_place(checkpoint, place)
        self.accelerator.wait_for_everyone()

    # ---- progress ----

    def training_seconds(self) -> float:
        """Seconds that the training has taken so far, with those before the checkpoint that it was resumed from."""
        return self._progress.get("seconds", 0.0) + time.perf_counter() - self._started

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`; the `train_loss` of a resumed training is that of all its steps."""
        self._loss_watch.finish()
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    def _place_in_stream(self) -> dict[str, tuple[int, int]]:
        """The epoch of a training set without length, and the batches of it that were trained on."""
        if has_length(self.callback_handler.train_dataloader):
            return {}
        epoch = int(self.state.epoch)
        if self._epoch_is_over:
            return {"stream": (epoch + 1, 0)}
        batches = (self.state.epoch - epoch) * self.state.max_steps * self.args.gradient_accumulation_steps
        return {"stream": (epoch, round(batches))}

    def _progress_of_process(self) -> dict[str, Any]:
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "means": self._means.state(),
        }

    def _go_on(self) -> None:
        """Go on with the sums of the checkpoint."""
        self._started = time.perf_counter()
        processes = self._progress.get("processes", [])
        if len(processes) != self.args.world_size:  # none, or another number of processes
            return
        own = processes[self.args.process_index]
        self._tr_loss.fill_(own["loss"])
        self._total_loss_scalar = own["total_loss"]
        self._globalstep_last_logged = own["last_logged"]
        self._means.load(own["means"], self.args.device)


class _Progress(TrainerCallback):
    """Goes on where the checkpoint was written, once the Trainer has set its sums to zero; knows when epochs end."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._go_on()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._epoch_is_over = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._epoch_is_over = True


class _LastStep(TrainerCallback):
    """Puts the checkpoint of the last step of an epoch off until the epoch was logged and evaluated.

    Else a training that is resumed from it would start with the next epoch, without that evaluation.
    """

    def __init__(self) -> None:
        self._put_off = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._put_off = control.should_save and ends_epoch(state)
        if self._put_off:
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save = control.should_save or self._put_off
        self._put_off = False
