"""The sub-networks of a training: what they leave out and see is settled before any long work."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import DataCollator, Trainer

from gradaug_hf.objective.objective import GradAug, ObjectiveSettings, Pass
from gradaug_hf.objective.resolutions import ResolutionTrial
from gradaug_hf.objective.sampling import Subnet, SubnetSampler
from gradaug_hf.objective.transforms import ImageTransform
from gradaug_hf.reports.plots import IMAGES_SHOWN, SeenBatch
from gradaug_hf.trainer import sharding
from gradaug_hf.trainer.batches import split_batch
from gradaug_hf.trainer.checks import check_checkpointing, check_train_dataset
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.full_loss import FullLoss, OwnLossGradAug
from gradaug_hf.trainer.preparation import leave_out_anything, make_subnets_possible
from gradaug_hf.utils.attributes import replaced
from gradaug_hf.utils.randomness import random_states_kept
from gradaug_hf.utils.settings import taken_from


@dataclass(eq=False)
class TrainingSubnets:
    """Prepare a model for its sub-networks, and run the passes of the objective that trains them.

    Sampler, transform and teacher are those of `GradAugTrainer`.
    """

    args: GradAugConfig
    given_sampler: SubnetSampler | None
    transform: ImageTransform | None
    teacher: nn.Module | None
    objective: GradAug | None = None  # of the training under way
    resolutions: list[int] | None = None  # None until they are settled
    trial: ResolutionTrial | None = None  # of the model that was prepared
    _step: ExitStack | None = None  # what is closed at the end of the step under way

    objective_class: ClassVar[type[GradAug]] = GradAug

    @property
    def sampler(self) -> SubnetSampler:
        """Return the sampler of the sub-networks."""
        if self.objective is not None:
            return self.objective.sampler
        resolutions = self.resolutions or self.args.resolutions
        return self.given_sampler or SubnetSampler.from_settings(self.args, resolutions=resolutions)

    def prepare(self, model: nn.Module, dataset: Any, collate: DataCollator) -> None:
        """Make a model slimmable and droppable, as its sub-networks need it, and settle their resolutions.

        Raises:
            ValueError: the settings, the model and the images do not fit each other.
        """
        check_train_dataset(dataset)
        check_checkpointing(model, self.args)
        mode = getattr(self.given_sampler or self.args, "subnet_mode", "width")
        make_subnets_possible(model, self.args, mode)
        self.trial = ResolutionTrial(model)
        if dataset is None or isinstance(dataset, IterableDataset):
            self.trial.check(self._given_resolutions)
            return
        with random_states_kept():
            batch = collate([dataset[0]] * 2)  # some collators need an even number
        self._settle_resolutions(model, split_batch(batch)[0])

    @property
    def _given_resolutions(self) -> list[int]:
        return list(getattr(self.given_sampler or self.args, "resolutions", None) or [])

    def _settle_resolutions(self, model: nn.Module, images: Any) -> None:
        side, trial = self.side(images), self.trial
        if isinstance(images, Tensor):  # those of a detector differ in shape
            trial = trial.for_shape(images.shape[2:])
        trial.check(self._given_resolutions)
        if self.given_sampler is not None:
            self.resolutions = []
            return
        self.resolutions = self.args.resolutions or trial.default(side)
        is_whole = set(self.resolutions) == {side} and self.transform is None
        if is_whole and not leave_out_anything(model, self.args):
            raise ValueError(
                f"GradAug would do nothing: every sub-network is all of {type(model).__name__}, and resolutions "
                f"is {self.resolutions}, the size of the images; set num_subnets=0, or give further resolutions"
            )

    @contextmanager
    def step(self) -> Iterator[None]:
        """Leave the last sub-network in place until the block, a step of a Trainer, is over."""
        with ExitStack() as stack, replaced(self, _step=stack):
            yield

    def run(self, trainer: Trainer, model: nn.Module, inputs: Any, full_loss: FullLoss | None) -> list[Pass]:
        """Run the passes of a batch.

        In a step with `subnet_backward="sequential"` all but the last have their backward, as the Trainer does it.

        Args:
            trainer: of the training.
            model: as the Trainer has wrapped it.
            inputs: the batch.
            full_loss: a user's loss of the full network; None: that of the objective.
        """
        images, labels, others = split_batch(inputs)
        if self.objective is None:
            self.objective = self.begin(trainer, model, images, full_loss)
        step = trainer.state.global_step
        subnets = self.objective.sampler.sample(step)
        sequential = self.args.subnet_backward == "sequential" and self._step is not None
        passes = self.objective.passes(images, labels, subnets, step=step, direct=sequential, **others)
        if not sequential:
            return list(passes)
        self._step.enter_context(closing(passes))
        done = []
        for _ in subnets:
            with sharding.gradients_held_back(trainer.accelerator, model):  # they cross ranks in the last backward
                early = next(passes)
                trainer.accelerator.backward(early.loss / trainer.current_gradient_accumulation_steps)
            done.append(replace(early, loss=early.loss.detach()))
        return [*done, next(passes)]

    def begin(self, trainer: Trainer, model: nn.Module, images: Any, full_loss: FullLoss | None) -> GradAug:
        """Return the objective of a training, whose resolutions are settled by a first batch if they were not."""
        if self.resolutions is None:
            self._settle_resolutions(trainer.model, images)
        kind = self.objective_class if full_loss is None else partial(OwnLossGradAug, full_loss=full_loss)
        return kind(
            model,
            sampler=self.given_sampler,
            transform=self.transform,
            teacher=self.teacher,
            label_smoothing=self.args.label_smoothing_factor,
            seed=self.args.seed,
            total_steps=trainer.state.max_steps,
            **taken_from(ObjectiveSettings, self.args) | {"resolutions": self.resolutions or None},
        )

    def side(self, images: Any) -> int:
        """Return the shorter side in pixels of a batch of images."""
        return min(images.shape[2:])

    def seen(self, images: Any, subnets: Sequence[Subnet], num_blocks: int) -> SeenBatch | None:
        """Return the batch to plot, or None to skip the plot."""
        return SeenBatch(images[:IMAGES_SHOWN].cpu(), subnets, self.transform, num_blocks)
