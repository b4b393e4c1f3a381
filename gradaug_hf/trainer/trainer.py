"""GradAugTrainer: the Trainer of transformers with the GradAug objective."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.data.data_collator import DataCollator, default_data_collator
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from gradaug_hf.data.collator import collate_images
from gradaug_hf.data.seeded import EpochCallback
from gradaug_hf.hub import configs
from gradaug_hf.hub.networks import image_processor, network_to_train
from gradaug_hf.hub.preprocessing import ProcessingClass
from gradaug_hf.hub.pushing import make_branch, push_errors
from gradaug_hf.objective.logits import logits_of, num_classes_of
from gradaug_hf.objective.problems import criterion_of, problem_of
from gradaug_hf.objective.sampling import SubnetSampler
from gradaug_hf.objective.transforms import ImageTransform
from gradaug_hf.reports.history import Evaluation
from gradaug_hf.reports.model_card import as_metadata
from gradaug_hf.slimming.widths import num_droppable_blocks
from gradaug_hf.trainer import checks, sharding
from gradaug_hf.trainer.batches import IGNORED, IMAGES, LABELS, Batch, as_evaluated, images_of, split_batch
from gradaug_hf.trainer.callbacks import LastStepCallback, PushCallback, ReportCallback, SpeedCallback
from gradaug_hf.trainer.checkpoints import describe_last, place_once, written_whole
from gradaug_hf.trainer.compilation import compile_statically, compiling
from gradaug_hf.trainer.config import GradAugConfig, as_gradaug_config
from gradaug_hf.trainer.full_loss import PlainLoss, loss_and_logits
from gradaug_hf.trainer.interruption import Interruption
from gradaug_hf.trainer.loaders import train_loader
from gradaug_hf.trainer.lock import locked
from gradaug_hf.trainer.loss_watch import LossWatch, last_checkpoint_named
from gradaug_hf.trainer.mixing import TrainingMixer
from gradaug_hf.trainer.preparation import lay_out
from gradaug_hf.trainer.resuming import ProgressCallback
from gradaug_hf.trainer.subnets import TrainingSubnets
from gradaug_hf.trainer.width_evaluation import evaluate_at_widths
from gradaug_hf.utils.attributes import replaced


class GradAugTrainer(Trainer):
    """`transformers.Trainer` that trains image classifiers with GradAug (arXiv 2006.07989).

    Batches are `pixel_values` (N, C, H, W) and `labels`, class indices (N,) or probabilities (N, classes); with
    several classes in an image, `problem_type="multi_label_classification"` in the model's config or in `args`,
    multi-hot ones (N, classes).
    Sub-networks run only while training: `evaluate` and `predict` are those of the plain full network, and with
    `num_subnets=0` so is training. Beside `loss`, training logs `loss_full`, `loss_subnets`, `subnet_width`,
    `subnet_resolution` and, where blocks are dropped, `subnet_depth`, the share that is not: means since the last log,
    of `loss_full` over all batches, of the others over those with sub-networks.

    A training can be killed at any time, and once resumed ends as if it had not been. SIGTERM and Ctrl-C end it with a
    checkpoint, a loss that is not finite without one. Checkpoints are written whole or not at all.

    Args:
        model: a timm model, a `TimmWrapperForImageClassification` or any transformers image classifier; made
            slimmable and droppable in place, as `args.subnet_mode` needs it. Or the Hub id, as `user/name` or
            `user/name@revision`, or the folder of one, which is loaded with its image processor. Or the name of a
            timm model, which is made anew for the classes that the dataset names.
        args: the settings; for a plain `TrainingArguments` the defaults of `GradAugConfig` hold.
        data_collator: as in `Trainer`, like all others that are not named here.
        train_dataset: with `args.seed_train_data`, the random numbers that a map-style dataset takes from Python,
            NumPy and torch to read an image are a function of seed, epoch and index.
        processing_class: the image processor, which is saved with the model.
        compute_loss_func: of `Trainer`; the loss of the full network. Sub-networks learn its prediction.
        compute_metrics: of `Trainer`, `topk_accuracy` or `mean_average_precision` for example.
        subnet_sampler: samples the sub-networks; what `args` says about them then has no effect.
        subnet_transform: maps images (N, C, H, W) to those that a sub-network sees before they are resized, for
            example `RandomQuarterTurn` or a `torchvision.transforms.v2` module; the random numbers that it takes from
            Python, NumPy and torch are seeded by the sampler.
        teacher: another model, whose prediction the sub-networks learn in place of the full network's. It sees the
            whole images, in evaluation mode and on their device; it is neither trained nor saved nor wrapped.
        card_metadata: what a trainer cannot know of the model card: arguments of `create_model_card` by name, such as
            `dataset`, `license` and `finetuned_from`.

    Raises:
        ValueError: the settings do not fit each other, the model, or how the processes were launched,
            `args.output_dir` cannot be written, or `model` cannot be loaded.
        PushError: `args.push_to_hub` is True, and the Hub refuses or cannot be reached.

    Examples:
        >>> args = GradAugConfig("out", min_width=0.9, resolutions=[64, 56, 48], max_steps=1)
        >>> trainer = GradAugTrainer(model, args, train_dataset=photos, compute_metrics=topk_accuracy)
        >>> trainer.train()  # doctest: +SKIP
    """

    _subnets_class, _report_class = TrainingSubnets, ReportCallback
    class_table: str | None = None  # of the results of each class, for the model card
    _to_go_on = "trainer.train(resume_from_checkpoint=True)"  # said where a signal ends a training

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessingClass | None = None,
        model_init: Callable[..., PreTrainedModel | nn.Module] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        subnet_sampler: SubnetSampler | None = None,
        subnet_transform: ImageTransform | None = None,
        teacher: nn.Module | None = None,
        card_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        args = GradAugConfig("tmp_trainer") if args is None else as_gradaug_config(args)
        self.card_metadata = dict(card_metadata or {})
        as_metadata(self.card_metadata)
        checks.check_output_dir(args)
        if args.num_subnets > 0:
            sharding.check_version(args)  # with another the Trainer's constructor may fail
        checkpoint = model if isinstance(model, str) else None
        if checkpoint:
            model = network_to_train(checkpoint, train_dataset, eval_dataset)
        self.subnet_transform, self.teacher = subnet_transform, teacher
        self._subnets = self._subnets_class(args, subnet_sampler, subnet_transform, teacher)
        self._partial_folder: Path | None = None  # while a checkpoint is written
        self._evaluated_size: tuple[int, ...] | None = None  # height and width of the images
        was_set_aside = not isinstance(model, PreTrainedModel)  # the Trainer asks any other one for a config
        with replaced(args, label_smoothing_factor=0.0) if was_set_aside else nullcontext():
            super().__init__(
                model,
                args,
                data_collator,
                train_dataset,
                eval_dataset,
                processing_class,
                model_init,
                compute_loss_func,
                compute_metrics,
                callbacks,
                optimizers,
                optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics,
            )
        if self.data_collator is default_data_collator:
            self.data_collator = collate_images
        self._loss_watch, self._interruption = LossWatch(), Interruption()
        self._progress, self._speed = ProgressCallback(self), SpeedCallback()
        self._report, self._pushes = self._report_class(self), PushCallback(self)
        own_callbacks = (self._speed, self._loss_watch, EpochCallback(), self._interruption, LastStepCallback())
        for callback in (*own_callbacks, self._progress, self._report, self._pushes):
            self.add_callback(callback)
        if checkpoint and self.processing_class is None:
            self.processing_class = image_processor(checkpoint)
        self._plain = PlainLoss(self, GradAugTrainer)
        self._is_plain = self._plain.is_trainers()
        smooths = args.label_smoothing_factor > 0 and (self._is_plain or isinstance(self.model, PreTrainedModel))
        if was_set_aside and smooths:
            self.label_smoother = LabelSmoother(epsilon=args.label_smoothing_factor)
        if not (self._plain.model_has_loss or self._is_plain):
            self.label_names = args.label_names or [LABELS]
            self._signature_columns = [IMAGES, "label", "label_ids", *self.label_names]
        self._mixer = TrainingMixer(self.model, args)
        checks.check_teacher(teacher, self.model, args)
        if not self._is_plain:
            problem = problem_of(self.model, args.problem_type)
            criterion_of(problem, compute_loss_func, args.label_smoothing_factor)
            self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = False
            self.data_collator = checks.LabelCheckingCollator(self.data_collator, num_classes_of(self.model), problem)
            checks.check_columns(args, train_dataset, eval_dataset)
        with self._as_saved():
            configs.warn_of_weights_alone(self.model)
        sharding.keep_contiguous(args, self.accelerator)
        lay_out(self.model, args)
        if args.num_subnets > 0:
            checks.check_launch(args, self.is_deepspeed_enabled)
            sharding.check_sharding(args, self.accelerator, self.model)
            compile_statically(self.subnet_sampler, args, self.accelerator)
            if model_init is None and train_dataset is not None:
                self._subnets.prepare(self.model, train_dataset, self.data_collator)
        if sharding.is_sharded(self.accelerator):
            sharding.plan_sharding(self.accelerator, self.model, args.num_subnets)
            self.add_callback(sharding.ShardingCallback())

    # ---- the model and its sub-networks ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `Trainer.train` does; SIGTERM and Ctrl-C end it with a checkpoint.

        Args:
            resume_from_checkpoint: folder of a checkpoint; True: the last one in `args.output_dir`.
            trial: of `Trainer.train`.
            ignore_keys_for_eval: of `Trainer.train`.

        Raises:
            ResumeError: the checkpoint cannot be read, is of another model, or of other settings or data.
            NonFiniteLossError: the loss is not finite.
            CheckpointError: a checkpoint cannot be written, or another training writes to `args.output_dir`.
            KeyboardInterrupt: after Ctrl-C, once the checkpoint is written; SIGTERM ends the process with status 143.
        """
        self._mixer.begin()
        self._subnets.objective = None  # model and settings may be others than in an earlier training
        self._plain.was_computed = False
        if self.args.num_subnets > 0 and self.model_init is None and self._subnets.trial is None:
            self._subnets.prepare(self.model, self.train_dataset, self.data_collator)
        checks.check_even_batches(self.args, self.train_dataset)
        with self._as_saved():
            folder = self._progress.begin(resume_from_checkpoint)
        run_dir = Path(self._get_output_dir(trial))
        with (
            last_checkpoint_named(run_dir),
            self._pushes.finished_after_error(),
            locked(run_dir) if self.args.should_save else nullcontext(),
            compiling(self.subnet_sampler, self.args),
            self._interruption.listening(self.args),
        ):
            output = super().train(folder, trial, ignore_keys_for_eval)
        self._interruption.end_process(self.state, describe_last(run_dir), self._to_go_on)
        return output._replace(training_loss=output.metrics["train_loss"])

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return the model of `model_init`; one that is about to be trained is made slimmable."""
        network = super().call_model_init(trial)
        if not getattr(self, "is_in_train", False):
            return network
        lay_out(network, self.args)
        if self.args.num_subnets > 0:
            self._subnets.prepare(network, self.train_dataset, self.data_collator)
        return network

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training set, which seeds the random augmentation of a map-style one."""
        loader = train_loader(self, super().get_train_dataloader)
        return self._progress.start_workers_aside(loader, was_started=True)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Return a loader of `Trainer`, whose kept workers leave the random numbers of a resumed training alone."""
        loader = super().get_eval_dataloader(eval_dataset)
        was_evaluated = any(key.startswith("eval_") for entry in self.state.log_history for key in entry)
        return self._progress.start_workers_aside(loader, was_evaluated)

    # ---- the loss ----

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do a step of `Trainer`; the last sub-network stays in place until its backward is over."""
        with self._subnets.step():
            loss = super().training_step(*args, **kwargs)
        self._plain.warn_if_passed_over()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the GradAug objective while training, else the full network's loss.

        In a training step with `subnet_backward="sequential"` all passes but the last have had their backward when
        this returns: the loss has the value of the whole objective and the graph of the last pass.
        """
        self._plain.was_computed = True
        if model.training:
            inputs = self._mixer(inputs, self.state.global_step)
        if self.args.num_subnets == 0 or not model.training:
            found = self._plain_loss(model, inputs, return_outputs, num_items_in_batch)
            if model.training and not (self._is_plain and self.args.logging_nan_inf_filter):
                self._loss_watch.add(self.state.global_step + 1, [found[0] if return_outputs else found])
            return found
        done = self._subnets.run(self, model, inputs, self.full_loss if self._plain.is_given else None)
        subnets, images = [p.subnet for p in done[1:]], inputs[IMAGES]
        side, num_blocks = self._subnets.side(images), num_droppable_blocks(self.model)
        self._loss_watch.add(self.state.global_step + 1, [p.loss for p in done], subnets)
        self._progress.means.add_passes(done, side, num_blocks)
        if self._report.seen is None and subnets:
            self._report.seen = self._subnets.seen(images, subnets, num_blocks)
        loss = sum(p.loss for p in done)
        return (loss, {"loss": loss, "logits": done[0].logits}) if return_outputs else loss

    def full_loss(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Any]:
        """Return the loss of the full network and its output; override it for another loss.

        It is that of `compute_loss_func` if there is one, else the cross-entropy or, with several classes in an image,
        the binary one. Sub-networks go on learning the prediction of the full network.

            class Weighted(GradAugTrainer):
                def full_loss(self, model, inputs):
                    logits = model(inputs["pixel_values"])
                    return nn.functional.cross_entropy(logits, inputs["labels"], weight=weights), logits

        Args:
            model: the full network, wrapped or not.
            inputs: the batch, with `pixel_values` (N, C, H, W) and `labels`.

        Returns:
            A scalar, averaged over the batch, and the model's output: logits (N, classes), or an object with `logits`.
        """
        images, labels, others = split_batch(inputs)
        output = model(images, **others)
        if self.compute_loss_func is not None:
            num_items = (labels != IGNORED).sum()  # of this batch, so that a sum over them gives a mean
            return self.compute_loss_func(output, labels, num_items_in_batch=num_items), output
        logits = logits_of(output, len(labels), num_classes_of(self.model))
        problem = problem_of(self.model, self.args.problem_type)
        return criterion_of(problem, label_smoothing=self.args.label_smoothing_factor)(logits, labels), logits

    def _plain_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool, num_items_in_batch: Tensor | int | None
    ) -> Tensor | tuple[Tensor, Any]:
        if self._plain.is_left_to_trainer(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, logits = loss_and_logits(self.full_loss, model, inputs, num_classes_of(self.model))
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Predict as `Trainer` does, also with a model that takes images by position and without labels."""
        inputs = as_evaluated(inputs, model, self.args)
        if isinstance(images := inputs.get(IMAGES), Tensor) and images.ndim == 4:
            self._evaluated_size = tuple(images.shape[2:])
        has_loss = self._plain.is_trainers(inputs) or self._plain.model_has_loss
        if has_loss or inputs.get(LABELS) is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = logits_of(model(images_of(inputs)), len(images_of(inputs)), num_classes_of(self.model))
        return None, None if prediction_loss_only else logits, None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as `Trainer` does, then at each of `args.eval_widths`, as `eval_width0.9_loss` and so on.

        Raises:
            ValueError: there are widths but no `train_dataset`, of which batch norm is recalibrated.
        """
        is_own = eval_dataset is None or eval_dataset is self.eval_dataset or isinstance(eval_dataset, str)
        with self._report.set_aside(not is_own):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
            if not isinstance(eval_dataset, dict):  # of which each was evaluated by a call of its own
                metrics |= evaluate_at_widths(self, eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    # ---- log, plots and model card ----

    @property
    def subnet_sampler(self) -> SubnetSampler:
        """Return the sampler of the sub-networks."""
        return self._subnets.sampler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, with the parts of the loss and the sub-networks added to the log of training."""
        if "loss" in logs and isinstance(self.train_dataset, IterableDataset):  # which its loader may slow down
            logs |= self._speed.take()
        self._progress.complete_log(logs)
        super().log(logs, start_time)

    @property
    def evaluations(self) -> list[Evaluation]:
        """Return the evaluations on `eval_dataset` so far."""
        return self._report.evaluations()

    def plot(self, folder: str | Path | None = None) -> list[Path]:
        """Plot the training so far: loss and accuracy over the epochs, accuracy against width, a batch as it was seen.

        Args:
            folder: where the PNG files go; None: `plots` in `args.output_dir`.

        Returns:
            The files, one for each of the three for which there is something to plot.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return self._report.plot(folder)

    def create_model_card(self, **metadata: Any) -> None:
        """Write the model card, `README.md`, to `args.output_dir`; one whose comment was removed is left as it is.

        Args:
            metadata: keyword arguments of `Trainer.create_model_card`; they win over `card_metadata`.
        """
        if self.is_world_process_zero():
            self._report.write_card(Path(self.args.output_dir), {**self.card_metadata, **metadata})

    # ---- checkpoint and Hub ----

    def settings(self) -> dict[str, Any]:
        """Return the settings that have to be the same when a training is resumed, by name."""
        return self._progress.settings(self._subnets)

    def training_seconds(self) -> float:
        """Return the seconds that the training took so far, with those before the checkpoint it was resumed from."""
        return self._progress.seconds()

    # A stream is resumed in the epoch and after the batch where it was, and no step is done after the last.
    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self._progress.place(*super()._init_training_state(*args, **kwargs))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the next batches; none if a signal that ends the training has ended the workers."""
        try:
            return super().get_batch_samples(*args, **kwargs)
        except RuntimeError:
            if not self._interruption.take_lost_workers():
                raise
            return [], None

    # A process that is killed leaves no half-written checkpoint, and what is resumed goes on with all its sums.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._loss_watch.finish()
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        not_pushed = replaced(self.args, push_to_hub=False)  # before it is in its place
        with not_pushed, written_whole(run_dir) as folder, replaced(self, _partial_folder=folder):
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(run_dir / name)
            self._progress.complete_checkpoint(folder / name, self.settings())
            place_once(folder / name, run_dir / name, self.accelerator)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best, use_mtime=True)

    # The Trainer writes a checkpoint where it is not taken for a whole one.
    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial_folder is None else str(self._partial_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `Trainer` does, with its card and, unless it is for a checkpoint, `plots`."""
        if sharding.stores_parts(self.accelerator):  # which the Trainer does not gather
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            is_checkpoint = _internal_call and output_dir is not None
            self._report.write(Path(output_dir or self.args.output_dir), with_plots=not is_checkpoint)

    # Every folder that is saved loads in timm and in transformers, whatever wraps the model.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self._evaluated_size is not None:
            configs.warn_of_other_size(model, self.processing_class, self._evaluated_size)
        network = configs.timm_network(model)
        if network is None or configs.why_not_rebuilt(network):
            configs.warn_of_no_processor(model, self.processing_class)
            if not isinstance(model, PreTrainedModel):  # which unties its tensors itself
                state_dict = configs.plain_state(model.state_dict() if state_dict is None else state_dict)
            return super()._save(output_dir, state_dict)
        state_dict = model.state_dict() if state_dict is None else state_dict
        prefix = "" if network is model else f"{model.base_model_prefix}."
        with replaced(self, model=network, processing_class=None):  # the weights alone, not what wraps them
            super()._save(output_dir, configs.plain_state({k.removeprefix(prefix): v for k, v in state_dict.items()}))
        if self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            names = configs.label_names(model, self.train_dataset, self.eval_dataset)
            configs.save_configs(model, folder, names, self.processing_class, self.args.problem_type)

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """Give the model for a while the form in which it is saved, which a subclass may change."""
        yield

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, as `Trainer` does, and the branch `args.hub_revision`.

        Raises:
            PushError: the Hub refuses, or cannot be reached.
        """
        if private is not None:
            self.args.hub_private_repo = private
        with push_errors(self.args, self.hub_model_id, "cannot be pushed to"):
            super().init_hf_repo(token)
        make_branch(self, self.args.hub_revision, token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push as `Trainer` does; a branch that `revision` names is made where there is none.

        Raises:
            PushError: the Hub refuses, or cannot be reached.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        make_branch(self, revision, token)
        with push_errors(self.args, self.hub_model_id, "was not pushed to", revision):
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
