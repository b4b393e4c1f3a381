"""ReportingTrainer: what a training did, as pictures and as a model card next to the weights."""

import shutil
import warnings
from pathlib import Path
from typing import Any

from transformers import Trainer

from gradaug_hf.reports.history import Evaluation, evaluations
from gradaug_hf.reports.model_card import CARD, may_be_written, write_model_card
from gradaug_hf.reports.plots import NEEDS_MATPLOTLIB, PLOTS, SeenBatch, can_plot, plot_training


class ReportingTrainer(Trainer):
    """`transformers.Trainer` that draws its training and describes the network that it saves.

    `card_metadata` holds what a trainer cannot know of the model card: keyword arguments of `create_model_card`, such
    as `dataset`, `license` and `finetuned_from`.

    Args:
        args: positional arguments of `transformers.Trainer`.
        kwargs: keyword arguments of `transformers.Trainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.card_metadata: dict[str, Any] = {}
        self._seen_batch: SeenBatch | None = None
        self._measured_elsewhere: list[dict[str, Any]] = []  # entries of the log, of other data than eval_dataset
        super().__init__(*args, **kwargs)

    @property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations on `eval_dataset` so far."""
        own = [e for e in self.state.log_history if not any(e is other for other in self._measured_elsewhere)]
        return evaluations(own, list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else ())

    def plot(self, folder: str | Path | None = None) -> list[Path]:
        """Draw the training so far: loss and accuracy over the epochs, accuracy against width, a batch as it was seen.

        Args:
            folder: where the PNG files go; None: `plots` in `args.output_dir`.

        Returns:
            The files, of which there is one for each of the three that there was something to draw of.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        folder = Path(self.args.output_dir) / PLOTS if folder is None else Path(folder)
        return plot_training(self.state.log_history, self.evaluations, self._seen_batch, folder)

    def create_model_card(self, **metadata: Any) -> None:
        """Write the model card, `README.md`, to `args.output_dir`; one whose comment was removed is left as it is.

        Args:
            metadata: keyword arguments of `Trainer.create_model_card`; they win over `card_metadata`.
        """
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir), {**self.card_metadata, **metadata})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, with the model card and, unless it is for a checkpoint, `plots`."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            is_checkpoint = _internal_call and output_dir is not None
            if not is_checkpoint:
                self._plot_if_possible(folder / PLOTS)
            self._write_card(folder, self.card_metadata)

    def _write_card(self, folder: Path, metadata: dict[str, Any]) -> None:
        write_model_card(self, folder, **metadata)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        card = Path(checkpoint_folder) / CARD  # Trainer copies the weights and their configuration
        if card.is_file() and may_be_written(Path(self.args.output_dir) / CARD) and self.is_world_process_zero():
            shutil.copy(card, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _plot_if_possible(self, folder: Path) -> None:
        if can_plot():
            self.plot(folder)
        else:
            warnings.warn(f"{folder} is not written: {NEEDS_MATPLOTLIB}", stacklevel=3)
