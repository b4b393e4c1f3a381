"""The trainer of the recipes: GradAugTrainer with the paper's optimiser and schedule."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.training_args import OptimizerNames

from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.trainer.trainer import GradAugTrainer
from gradaug_hf.utils.environment import public_settings

MOMENTUM = 0.9


class RecipeTrainer(GradAugTrainer):
    """Train as GradAugTrainer does, with the paper's SGD and learning rate.

    With `optim="sgd"` momentum is Nesterov's, and weight decay is on all parameters, batch norm and biases among them.

    Args:
        model: the model, made for the classes.
        args: the settings.
        lr_drops: shares of the training after which the learning rate is a tenth; none: `lr_scheduler_type` holds.
        experiment: further settings that have to be the same when the training is resumed, by name.
        kwargs: further keyword arguments of GradAugTrainer.
    """

    _to_go_on = "the same command with --resume_from_checkpoint last"

    def __init__(
        self,
        model: nn.Module,
        args: GradAugConfig,
        *,
        lr_drops: Sequence[float] = (),
        experiment: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.lr_drops = lr_drops
        self.experiment = experiment or {}
        self.evaluation_seconds = 0.0
        super().__init__(model, args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as GradAugTrainer does, and add the time to `evaluation_seconds`."""
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self.evaluation_seconds += time.perf_counter() - start
        return metrics

    def settings(self) -> dict[str, Any]:
        """Return the settings that have to be the same when a training is resumed."""
        return super().settings() | public_settings(self.experiment)

    def training_seconds(self) -> float:
        """Return the seconds that the training has taken so far, without those of evaluation."""
        return super().training_seconds() - self.evaluation_seconds

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return SGD with Nesterov momentum on all parameters, or the optimiser that another `optim` names."""
        if self.args.optim != OptimizerNames.SGD or self.optimizer is not None:
            return super().create_optimizer(model)
        self.optimizer = SGD(
            (self.model if model is None else model).parameters(),
            lr=self.args.learning_rate,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=self.args.weight_decay,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return the schedule of the learning rate, with `lr_drops` where there are any."""
        if not self.lr_drops or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            drops = sum(step >= share * num_training_steps for share in self.lr_drops)
            return (step / warmup if step < warmup else 1.0) * 0.1**drops

        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        return self.lr_scheduler
