"""GradAugTrainer: the Trainer of transformers with the GradAug objective."""

import math
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging
from transformers.utils.generic import find_labels

from gradaug_hf.hub.configs import (
    label_names,
    plain_state,
    save_configs,
    timm_network,
    why_not_rebuilt,
)
from gradaug_hf.hub.networks import image_processor, load_checkpoint
from gradaug_hf.hub.pushing import PushingTrainer
from gradaug_hf.objective.losses import cross_entropy
from gradaug_hf.objective.mixing import BatchMixer
from gradaug_hf.objective.objective import GradAug, Pass, logits_of
from gradaug_hf.objective.resolutions import ResolutionTrial
from gradaug_hf.objective.sampling import Subnet, SubnetSampler, drops_blocks, drops_channels
from gradaug_hf.objective.transforms import ImageTransform
from gradaug_hf.reports.plots import IMAGES_SHOWN, SeenBatch
from gradaug_hf.slimming import make_slimmable, recalibrate_batchnorm, slicing_report
from gradaug_hf.slimming.depth import make_droppable
from gradaug_hf.slimming.patching import is_slimmable, num_droppable_blocks
from gradaug_hf.slimming.sync_batchnorm import synchronise_batchnorm
from gradaug_hf.trainer.checks import (
    LabelCheckingCollator,
    check_checkpointing,
    check_launch,
    check_output_dir,
    check_sharding,
)
from gradaug_hf.trainer.compilation import check_compilable, compile_statically, compiling
from gradaug_hf.trainer.config import GradAugConfig, as_gradaug_config
from gradaug_hf.trainer.reporting import ReportingTrainer
from gradaug_hf.trainer.resuming import ResumableTrainer
from gradaug_hf.utils.randomness import random_states_kept

logger = logging.get_logger(__name__)

IMAGES, LABELS = "pixel_values", "labels"
# Training images of which batch norm is recalibrated before a sub-network is evaluated.
CALIBRATION_IMAGES = 1024


class GradAugTrainer(PushingTrainer, ReportingTrainer, ResumableTrainer):
    """`transformers.Trainer` that trains image classifiers with GradAug (arXiv 2006.07989).

    Batches are `pixel_values` (N, C, H, W) and `labels`, class indices (N,) or probabilities (N, classes).
    Sub-networks run only while training: `evaluate` and `predict` are those of the plain full network, and with
    `num_subnets=0` so is training. Beside `loss`, training logs `loss_full`, `loss_subnets`, `subnet_width`,
    `subnet_resolution` and, where blocks are dropped, `subnet_depth`, the share that is not: means since the last log,
    of `loss_full` over all batches, of the others over those with sub-networks.

    Args:
        model: a timm network, a `TimmWrapperForImageClassification` or any transformers image classifier; made
            slimmable and droppable in place, as `args.subnet_mode` needs it. Or the Hub id, as `user/name` or
            `user/name@revision`, or the folder of one, which is loaded with its image processor.
        args: the settings; for a plain `TrainingArguments` the defaults of `GradAugConfig` hold.
        trainer_args: further positional arguments of `transformers.Trainer`.
        subnet_sampler: draws the sub-networks; what `args` says about them then has no effect.
        subnet_transform: maps images (N, C, H, W) to those that a sub-network sees before they are resized, for
            example `RandomQuarterTurn` or a `torchvision.transforms.v2` module; what it draws at random from Python,
            NumPy and torch is seeded by the sampler.
        kwargs: further keyword arguments of `transformers.Trainer`.

    Raises:
        ValueError: the settings do not fit each other, the network, or how the processes were launched,
            `args.output_dir` cannot be written, or `model` cannot be loaded.
        PushError: `args.push_to_hub` is True, and the Hub refuses or cannot be reached.
    """

    _objective_class: type[GradAug] = GradAug

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        *trainer_args: Any,
        subnet_sampler: SubnetSampler | None = None,
        subnet_transform: ImageTransform | None = None,
        **kwargs: Any,
    ) -> None:
        args = GradAugConfig("tmp_trainer") if args is None else as_gradaug_config(args)
        check_output_dir(args)
        if args.num_subnets > 0:
            check_sharding(args)  # which the Trainer's constructor may not stand
        checkpoint = model if isinstance(model, str) else None
        model = load_checkpoint(checkpoint) if checkpoint else model
        self._subnet_sampler = subnet_sampler
        self.subnet_transform = subnet_transform
        self._resolution_trial: ResolutionTrial | None = None
        self._resolutions: list[int] | None = None
        self._objective: GradAug | None = None
        self._step_stack: ExitStack | None = None
        self._mixer: BatchMixer | None = None
        self._mixed_batches = (-1, 0)  # step, and number of the batch within it that was mixed last
        with _label_smoothing_set_aside(args, model):
            super().__init__(model, args, *trainer_args, **kwargs)
        if checkpoint and self.processing_class is None:
            self.processing_class = image_processor(checkpoint)
        if args.label_smoothing_factor > 0 and model is None and isinstance(self.model, PreTrainedModel):
            self.label_smoother = LabelSmoother(epsilon=args.label_smoothing_factor)
        self._network_has_loss = bool(find_labels(type(self.model)))
        if not self._network_has_loss:
            self.label_names = args.label_names or [LABELS]
        if args.mixup_alpha > 0 or args.cutmix_alpha > 0:
            self._mixer = self._make_mixer()
        if args.num_subnets > 0 or self._mixer is not None or not self._network_has_loss:
            self._use_own_loss()
        network = timm_network(self.model)
        if network is not None and (reason := why_not_rebuilt(network)):
            name = type(network).__name__
            warnings.warn(f"the folder of this {name} will have its weights alone: {reason}", stacklevel=2)
        if self.model_init is None:
            self._lay_out(self.model)
        if args.num_subnets > 0:
            check_launch(args, self.is_deepspeed_enabled)
            check_sharding(args, getattr(self.accelerator.state, "deepspeed_plugin", None))
            if args.torch_compile:
                check_compilable(self.subnet_sampler)
                compile_statically(self.accelerator)
            if self.model_init is None and self.train_dataset is not None:
                self._prepare_network(self.model)

    def _use_own_loss(self) -> None:
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func is given, but GradAugTrainer has its own loss for this network")
        config = getattr(self.model, "config", None)
        problem = getattr(config, "problem_type", None)
        if problem not in (None, "single_label_classification"):
            raise ValueError(f"problem_type is {problem!r}; GradAug needs 'single_label_classification'")
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        if (num_classes := self._num_classes()) is not None:
            self.data_collator = LabelCheckingCollator(self.data_collator, num_classes)

    def _make_mixer(self) -> BatchMixer:
        num_classes = self._num_classes()
        if num_classes is None:
            raise ValueError(
                f"mixup_alpha or cutmix_alpha is on, but {type(self.model).__name__} has neither num_classes nor "
                "config.num_labels"
            )
        return BatchMixer(num_classes, self.args.mixup_alpha, self.args.cutmix_alpha, self.args.mix_prob)

    def _num_classes(self) -> int | None:
        config = getattr(self.model, "config", None)
        return getattr(config, "num_labels", None) or getattr(self.model, "num_classes", None) or None

    # ---- the network and its sub-networks ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`, which makes the network slimmable first where that was not done yet."""
        self._mixed_batches = (-1, 0)
        self._objective = None  # network and settings may be others than in an earlier training
        self._seen_batch = None
        if self.args.num_subnets > 0 and self.model_init is None and self._resolution_trial is None:
            self._prepare_network(self.model)
        with compiling(self.subnet_sampler, self.args):
            return super().train(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """`Trainer.call_model_init`; a network that is about to be trained is made slimmable."""
        network = super().call_model_init(trial)
        if not getattr(self, "is_in_train", False):
            return network
        self._lay_out(network)
        if self.args.num_subnets > 0:
            self._prepare_network(network)
        return network

    def _lay_out(self, network: nn.Module) -> None:
        """Give a network its memory format and its batch norm, before it is made slimmable."""
        if self.args.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.args.sync_batchnorm and self.args.world_size > 1:
            synchronise_batchnorm(network, self.args.device)

    def _prepare_network(self, network: nn.Module) -> None:
        """Make a network slimmable, and settle what its sub-networks are before any long work."""
        check_checkpointing(network, self.args)
        if drops_channels(self._subnet_mode):
            make_slimmable(network, width_divisor=self.args.width_divisor)
            if (sliced := slicing_report(network).sliced_macs) < 0.5:
                others = "images and their dropped blocks" if drops_blocks(self._subnet_mode) else "images"
                warnings.warn(
                    f"{sliced:.0%} of {type(network).__name__} is sliced, so that its sub-networks differ from it by "
                    f"their {others} {'mostly' if sliced else 'only'}; print(gradaug_hf.slicing_report(model)) says "
                    "why",
                    stacklevel=3,
                )
        if drops_blocks(self._subnet_mode):
            make_droppable(network)
        self._resolution_trial = ResolutionTrial(network)
        chosen = getattr(self._subnet_sampler or self.args, "resolutions", None)
        self._resolution_trial.check(chosen or [])
        if self.train_dataset is not None and not isinstance(self.train_dataset, IterableDataset):
            with random_states_kept():
                batch = self.data_collator([self.train_dataset[0]])
            self._settle_resolutions(network, _split(batch)[0])

    def _settle_resolutions(self, network: nn.Module, images: Tensor) -> None:
        """Choose the resolutions of a model's sub-networks, for images of the shape of these."""
        side = self._side(images)
        trial = self._resolution_trial.for_shape(images.shape[2:])
        trial.check(getattr(self._subnet_sampler or self.args, "resolutions", None) or [])
        if self._subnet_sampler is not None:
            self._resolutions = []
            return
        self._resolutions = self.args.resolutions or trial.default(side)
        if set(self._resolutions) == {side} and not self._subnets_differ(network) and self.subnet_transform is None:
            raise ValueError(
                f"GradAug would do nothing: every sub-network is all of {type(network).__name__}, and resolutions "
                f"is {self._resolutions}, the size of the images; set num_subnets=0, or give further resolutions"
            )

    def _side(self, images: Any) -> int:
        """Shorter side in pixels of a batch of images."""
        return min(images.shape[2:])

    @property
    def _subnet_mode(self) -> str:
        return getattr(self._subnet_sampler or self.args, "subnet_mode", "width")

    def _subnets_differ(self, network: nn.Module) -> bool:
        """Whether sub-networks leave out anything of a network."""
        mode, args = self.args.subnet_mode, self.args
        narrower = drops_channels(mode) and slicing_report(network).sliced_macs > 0 and args.min_width < 1
        return narrower or (drops_blocks(mode) and args.min_survival < 1)

    def _make_objective(self, model: nn.Module, images: Tensor) -> GradAug:
        if self._resolutions is None:  # the training set is a stream, of which this is the first batch
            self._settle_resolutions(self.model, images)
        args = self.args
        return self._objective_class(
            model,
            num_subnets=args.num_subnets,
            min_width=args.min_width,
            max_width=args.max_width,
            resolutions=self._resolutions,
            width_levels=args.width_levels,
            kl_weight=args.kl_weight,
            subnet_target=args.subnet_target,
            label_smoothing=args.label_smoothing_factor,
            seed=args.seed,
            subnet_mode=args.subnet_mode,
            min_survival=args.min_survival,
            subnet_interval=args.subnet_interval,
            sampler=self._subnet_sampler,
            transform=self.subnet_transform,
        )

    # ---- the loss ----

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """`Trainer.training_step`; the last sub-network stays in place until its backward is over."""
        with ExitStack() as stack:
            stack.callback(setattr, self, "_step_stack", None)
            self._step_stack = stack
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The GradAug objective while training, else the full network's loss.

        In a training step with `subnet_backward="sequential"` all passes but the last have had their backward when
        this returns: the loss has the value of the whole objective and the graph of the last pass.
        """
        if model.training and self._mixer is not None:
            inputs = self._mix(inputs)
        if self.args.num_subnets == 0 or not model.training:
            found = self._plain_loss(model, inputs, return_outputs, num_items_in_batch)
            if model.training:
                self._loss_watch.add(self.state.global_step + 1, [found[0] if return_outputs else found])
            return found
        images, labels, others = _split(inputs)
        if self._objective is None:
            self._objective = self._make_objective(model, images)
        subnets = self._objective.sampler.sample(self.state.global_step)
        passes = self._objective.passes(images, labels, subnets, **others)
        if self.args.subnet_backward == "sequential" and self._step_stack is not None:
            done = self._run_sequentially(model, passes, len(subnets))
        else:
            done = list(passes)
        self._record(done, images)
        loss = sum(p.loss for p in done)
        return (loss, {"loss": loss, "logits": done[0].logits}) if return_outputs else loss

    def _run_sequentially(self, model: nn.Module, passes: Iterator[Pass], num_early: int) -> list[Pass]:
        """Run the passes and the backward of all but the last, which is the Trainer's, as it does that one."""
        self._step_stack.enter_context(closing(passes))
        done = []
        for _ in range(num_early):
            with self.accelerator.no_sync(model):  # gradients cross ranks once, in the last backward
                early = next(passes)
                self.accelerator.backward(early.loss / self.current_gradient_accumulation_steps)
            done.append(replace(early, loss=early.loss.detach()))
        return [*done, next(passes)]

    def _mix(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mix a batch, as a function of the seed, the step, the batch within the step and the rank."""
        step, batch = self._mixed_batches
        batch = batch + 1 if step == self.state.global_step else 0
        self._mixed_batches = (self.state.global_step, batch)
        draw = random.Random(f"{self.args.seed} {self.state.global_step} {batch} {self.args.process_index}")
        images, labels, others = _split(inputs)
        images, labels = self._mixer(images, labels, draw.getrandbits(32))
        return {IMAGES: images, LABELS: labels, **others}

    def _plain_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Tensor | int | None
    ) -> Tensor | tuple[Tensor, Any]:
        soft_labels = isinstance(inputs.get(LABELS), Tensor) and inputs[LABELS].is_floating_point()
        if self._network_has_loss and not soft_labels:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        images, labels, others = _split(inputs)
        logits = logits_of(model(images, **others), len(labels))
        loss = cross_entropy(logits, labels, self.args.label_smoothing_factor)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`Trainer.prediction_step`, also for a network that takes images by position and without labels."""
        if self._network_has_loss or inputs.get(LABELS) is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = logits_of(model(_images(inputs)), len(_images(inputs)))
        return None, None if prediction_loss_only else logits, None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """`Trainer.evaluate`, then the same for each of `args.eval_widths`, as `eval_width0.9_loss` and so on.

        Raises:
            ValueError: there are widths but no `train_dataset`, of which batch norm is recalibrated.
        """
        logged_before = len(self.state.log_history)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        is_own = eval_dataset is None or eval_dataset is self.eval_dataset or isinstance(eval_dataset, str)
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):  # each was evaluated by a call of its own
            return metrics
        for width in self.args.eval_widths:
            found = self._evaluate_at_width(width, eval_dataset, ignore_keys, f"{metric_key_prefix}_width{width:g}")
            self.log(found)
            metrics.update(found)
        if not is_own:
            self._measured_elsewhere += self.state.log_history[logged_before:]
        return metrics

    def _evaluate_at_width(
        self, width: float, eval_dataset: Any, ignore_keys: list[str] | None, prefix: str
    ) -> dict[str, float]:
        if not is_slimmable(self.model):
            make_slimmable(self.model, width_divisor=self.args.width_divisor)
        with random_states_kept(), recalibrate_batchnorm(self.model, width, self._calibration_batches()):
            return self.evaluation_loop(
                self.get_eval_dataloader(eval_dataset),
                description=f"Evaluation at width {width:g}",
                prediction_loss_only=True if self.compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=prefix,
            ).metrics

    def _calibration_batches(self) -> Iterator[Tensor]:
        """Images of the training set, the same on every rank."""
        if self.train_dataset is None:
            raise ValueError("eval_widths needs a train_dataset, of which batch norm is recalibrated")
        torch.default_generator.manual_seed(self.args.seed)  # the images are augmented alike at every evaluation
        images = self.train_dataset
        if not isinstance(images, IterableDataset):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.args.seed))
            images = Subset(images, order[:CALIBRATION_IMAGES].tolist())
        size = self.args.per_device_train_batch_size
        loader = DataLoader(images, size, collate_fn=self.data_collator, num_workers=self.args.dataloader_num_workers)
        for batch in islice(loader, math.ceil(CALIBRATION_IMAGES / size)):
            yield _images(self._prepare_inputs(batch))

    # ---- log and checkpoint ----

    @property
    def subnet_sampler(self) -> SubnetSampler:
        """What draws the sub-networks."""
        if self._objective is not None:
            return self._objective.sampler
        args = self.args
        return self._subnet_sampler or SubnetSampler(
            args.num_subnets,
            args.min_width,
            args.max_width,
            self._resolutions or args.resolutions,
            args.width_levels,
            args.seed,
            args.subnet_mode,
            args.min_survival,
            args.subnet_interval,
        )

    def _record(self, passes: list[Pass], images: Tensor) -> None:
        full, *others = passes
        self._loss_watch.add(self.state.global_step + 1, [p.loss for p in passes], [p.subnet for p in others])
        self._means.add(loss_full=full.loss.detach())
        if others:
            self._means.add(loss_subnets=sum(p.loss.detach() for p in others))
        num_blocks = num_droppable_blocks(self.model)
        if self._seen_batch is None and others:
            self._seen_batch = self._see(images, [p.subnet for p in others])
        for p in others:
            side = p.subnet.resolution or self._side(images)
            self._means.add(subnet_width=p.subnet.width, subnet_resolution=side)
            if num_blocks:
                self._means.add(subnet_depth=1 - len(p.dropped) / num_blocks)

    def _see(self, images: Tensor, subnets: list[Subnet]) -> SeenBatch | None:
        """What is drawn of a batch; None draws nothing."""
        num_blocks = num_droppable_blocks(self.model)
        return SeenBatch(images[:IMAGES_SHOWN].cpu(), subnets, self.subnet_transform, num_blocks)

    def settings(self) -> dict[str, Any]:
        """What has to be the same when a training is resumed."""
        own = {"subnet_sampler": self._subnet_sampler, "subnet_transform": self.subnet_transform}
        return super().settings() | {name: None if x is None else type(x).__name__ for name, x in own.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with the parts of the loss and the sub-networks added to the log of training."""
        if "loss" in logs:
            for name, mean in self._means.take().items():
                logs[name] = self.accelerator.reduce(mean, "mean").item() if isinstance(mean, Tensor) else mean
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        network = timm_network(model)
        if network is None or why_not_rebuilt(network):
            if isinstance(model, PreTrainedModel) and self.processing_class is None:
                logger.warning_once(
                    "no preprocessor_config.json is written, which a pipeline needs: give GradAugTrainer the image "
                    "processor as processing_class"
                )
            if not isinstance(model, PreTrainedModel):  # which unties its tensors itself
                state_dict = plain_state(model.state_dict() if state_dict is None else state_dict)
            return super()._save(output_dir, state_dict)
        state_dict = model.state_dict() if state_dict is None else state_dict
        prefix = "" if network is model else f"{model.base_model_prefix}."
        with self._saving(network):
            super()._save(output_dir, plain_state({k.removeprefix(prefix): v for k, v in state_dict.items()}))
        if self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            names = label_names(model, self.train_dataset, self.eval_dataset)
            save_configs(model, folder, names, self.processing_class)

    @contextmanager
    def _saving(self, network: nn.Module) -> Iterator[None]:
        """Have `Trainer` save a network, of which it keeps the weights alone, rather than what wraps it."""
        kept = self.model, self.processing_class
        self.model, self.processing_class = network, None
        try:
            yield
        finally:
            self.model, self.processing_class = kept


def _images(batch: Any) -> Tensor:
    if not isinstance(batch, Mapping) or IMAGES not in batch:
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"a batch holds {found}; expected {IMAGES!r} (N, C, H, W) and {LABELS!r}")
    return batch[IMAGES]


def _split(batch: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Images, labels and the rest of a batch."""
    images = _images(batch)
    if batch.get(LABELS) is None:
        raise ValueError(f"a batch holds {list(batch)}; expected {IMAGES!r} and {LABELS!r}, (N,) or (N, classes)")
    return images, batch[LABELS], {name: value for name, value in batch.items() if name not in (IMAGES, LABELS)}


@contextmanager
def _label_smoothing_set_aside(args: TrainingArguments, model: nn.Module | None) -> Iterator[None]:
    """Hide label smoothing, for which Trainer's constructor asks any network for the config of a PreTrainedModel."""
    if isinstance(model, PreTrainedModel):
        yield
        return
    factor = args.label_smoothing_factor
    args.label_smoothing_factor = 0.0
    try:
        yield
    finally:
        args.label_smoothing_factor = factor
