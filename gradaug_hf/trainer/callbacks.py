"""Side work of a training: facts for plots and model card, pushes that fail, checkpoints at the end of an epoch."""

import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradaug_hf.hub.configs import PREPROCESSOR
from gradaug_hf.hub.pushing import warn_of_failed_push
from gradaug_hf.reports.history import Entry, Evaluation, evaluations
from gradaug_hf.reports.model_card import CARD, as_metadata, may_be_written, write_model_card
from gradaug_hf.reports.plots import NEEDS_MATPLOTLIB, PLOTS, SeenBatch, can_plot, plot_training
from gradaug_hf.trainer.card_facts import model_facts
from gradaug_hf.trainer.interruption import ends_epoch


class ReportCallback(TrainerCallback):
    """Keep the facts of plots and model card that the Trainer's log lacks, and write both.

    Nothing is written at an event: a checkpoint has to have its card before it is put in its place and pushed.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.seen: SeenBatch | None = None
        self._elsewhere: list[Entry] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget the batch of the training before."""
        self.seen = None

    @contextmanager
    def set_aside(self, is_elsewhere: bool) -> Iterator[None]:
        """Leave what the block logs out of the evaluations, if it is of other data than `eval_dataset`."""
        logged_before = len(self._trainer.state.log_history)
        yield
        if is_elsewhere:
            self._elsewhere += self._trainer.state.log_history[logged_before:]

    def evaluations(self) -> list[Evaluation]:
        """Return the evaluations on `eval_dataset` so far."""
        history, data = self._trainer.state.log_history, self._trainer.eval_dataset
        own = [entry for entry in history if not any(entry is other for other in self._elsewhere)]
        return evaluations(own, list(data) if isinstance(data, dict) else ())

    def plot(self, folder: str | Path | None = None) -> list[Path]:
        """Plot the training so far into a folder, by default `plots` in `args.output_dir`, and return the files."""
        folder = Path(self._trainer.args.output_dir) / PLOTS if folder is None else Path(folder)
        return plot_training(self._trainer.state.log_history, self.evaluations(), self.seen, folder)

    def write(self, folder: Path, with_plots: bool) -> None:
        """Write the model card of a saved model, and `plots`, or warn that matplotlib is missing for them."""
        if with_plots and can_plot():
            self.plot(folder / PLOTS)
        elif with_plots:
            warnings.warn(f"{folder / PLOTS} is not written: {NEEDS_MATPLOTLIB}", stacklevel=3)
        self.write_card(folder, self._trainer.card_metadata)

    def write_card(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Write the model card into a folder, with the statements of its author."""
        write_model_card(folder, model_facts(self._trainer), as_metadata(metadata))


class SpeedCallback(TrainerCallback):
    """Measure how many images a second are trained on, loading included and evaluations and checkpoints left out."""

    def __init__(self) -> None:
        self._since, self._seconds, self._images = time.perf_counter(), 0.0, 0

    def _wait(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    on_train_begin = on_evaluate = on_save = _wait

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the images of the step, over all processes; the last batch of an epoch as a whole one."""
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        self._images += args.train_batch_size * args.world_size * args.gradient_accumulation_steps

    def take(self) -> dict[str, float]:
        """Return the images per second since the last call, and start to count anew."""
        found = {"images_per_second": round(self._images / self._seconds, 1)} if self._seconds else {}
        self._seconds, self._images = 0.0, 0
        return found


class PushCallback(TrainerCallback):
    """Warn of each push of a checkpoint that fails, which the Trainer does not, and complete the pushed files."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for the push before, which reads the same files, and add those that the Trainer does not copy."""
        self.finish()
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for name in (PREPROCESSOR, CARD) if state.is_world_process_zero else ():
            edited = name == CARD and not may_be_written(Path(args.output_dir) / CARD)
            if (checkpoint / name).is_file() and not edited:
                shutil.copy(checkpoint / name, args.output_dir)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for the last push."""
        self.finish()

    @contextmanager
    def finished_after_error(self) -> Iterator[None]:
        """Wait for the push under way if an error ends the block."""
        try:
            yield
        except Exception:
            self.finish()
            raise

    def finish(self) -> None:
        """Wait for the push under way, and warn if it fails."""
        self._trainer._finish_current_push()
        push = getattr(self._trainer, "push_in_progress", None)
        if push is None:
            return
        self._trainer.push_in_progress = None
        for error in filter(None, (job.exception() for job in push.jobs)):
            warn_of_failed_push(self._trainer.args, self._trainer.hub_model_id, error)


class LastStepCallback(TrainerCallback):
    """Put the checkpoint of the last step of an epoch off until the epoch was logged and evaluated.

    Else a training that is resumed from it would start with the next epoch, without that evaluation.
    """

    def __init__(self) -> None:
        self._put_off = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the checkpoint off, if the step ends an epoch."""
        self._put_off = control.should_save and ends_epoch(state)
        if self._put_off:
            control.should_save = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the checkpoint that was put off."""
        control.should_save = control.should_save or self._put_off
        self._put_off = False
