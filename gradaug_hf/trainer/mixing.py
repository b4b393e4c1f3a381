"""Mixup and CutMix of the batches of a training, so that a resumed one mixes them alike."""

import random
from typing import Any

from torch import nn

from gradaug_hf.objective.logits import num_classes_of
from gradaug_hf.objective.mixing import BatchMixer
from gradaug_hf.trainer.batches import IMAGES, LABELS, split_batch
from gradaug_hf.trainer.config import GradAugConfig


class TrainingMixer:
    """Mix batches, if settings ask for it, as a function of seed, step, batch within the step and rank."""

    def __init__(self, model: nn.Module, args: GradAugConfig) -> None:
        self._args = args
        self._is_on = args.mixup_alpha > 0 or args.cutmix_alpha > 0
        if self._is_on:
            num_classes = num_classes_of(model)
            if num_classes is None:
                raise ValueError(
                    f"mixup_alpha or cutmix_alpha is on, but {type(model).__name__} has neither num_classes nor "
                    "config.num_labels"
                )
            self._mix = BatchMixer(num_classes, args.mixup_alpha, args.cutmix_alpha, args.mix_prob)
        self.begin()

    def begin(self) -> None:
        """Begin a training."""
        self._step, self._batch = -1, 0

    def __call__(self, inputs: dict[str, Any], step: int) -> dict[str, Any]:
        """Return the next batch of a step, mixed if there is mixing."""
        if not self._is_on:
            return inputs
        self._step, self._batch = step, self._batch + 1 if step == self._step else 0
        generator = random.Random(f"{self._args.seed} {step} {self._batch} {self._args.process_index}")
        images, labels, others = split_batch(inputs)
        images, labels = self._mix(images, labels, generator.getrandbits(32))
        return {IMAGES: images, LABELS: labels, **others}
