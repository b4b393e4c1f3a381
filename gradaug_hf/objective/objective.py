"""The GradAug objective: the full network learns the labels, its sub-networks learn from the full network."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from transformers.hf_argparser import HfArg

from gradaug_hf.objective.logits import logits_of, num_classes_of
from gradaug_hf.objective.problems import PROBLEM_TYPES, Loss, ProblemType, criterion_of, problem_of
from gradaug_hf.objective.resolutions import ResolutionTrial, default_resolutions
from gradaug_hf.objective.sampling import Subnet, SubnetSampler, SubnetSettings, drops_blocks, drops_channels
from gradaug_hf.objective.teaching import check_teacher, taught
from gradaug_hf.objective.transforms import ImageTransform, check_images, transform_for_subnet
from gradaug_hf.slimming import make_slimmable, subnet_pass
from gradaug_hf.slimming.depth import make_droppable
from gradaug_hf.slimming.sync_batchnorm import CpuSyncBatchNorm
from gradaug_hf.slimming.tokens import find_tokens, tokens_kept
from gradaug_hf.slimming.widths import is_slimmable, num_droppable_blocks
from gradaug_hf.utils.randomness import random_states_kept
from gradaug_hf.utils.settings import documented_by, spelled_by, taken_from

SubnetTarget = Literal["soft", "label"]
SUBNET_TARGETS = get_args(SubnetTarget)
# Parts of fewer images make the statistics of batch norm noisy.
FEW_IMAGES = 16
# Classes that carry gradients from one process to the others; those of parameters that do have a device mesh.
WRAPPERS = {"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel", "DeepSpeedEngine"}


@dataclass(frozen=True)
class Pass:
    """One forward pass of a step.

    Args:
        loss: its part of the objective, a scalar with its graph.
        logits: (images, classes), detached, of the images that it saw; None where an objective has none.
        subnet: the sub-network; None for the full network.
        dropped: indices of the residual blocks that it left out, among those that can be.
    """

    loss: Tensor
    logits: Tensor | None = None
    subnet: Subnet | None = None
    dropped: frozenset[int] = frozenset()


@dataclass
class ObjectiveSettings(SubnetSettings):
    """Settings of the objective, shared by `GradAug` and `GradAugConfig`."""

    kl_weight: float = HfArg(default=1.0, help="Weight of the sub-networks' losses, at least 0.")
    kl_warmup: float = HfArg(
        default=0.0,
        help="Share of the steps in which the weight of the sub-networks' losses rises linearly from 0 to "
        "kl_weight, in [0, 1]; 0 has all of it from the first step on, as in the paper.",
    )
    subnet_target: SubnetTarget = HfArg(
        default="soft",
        help='What sub-networks learn; "soft": the full network\'s prediction (in-place distillation), by KL '
        'divergence, "label": the labels, by the criterion, else cross-entropy.',
    )
    problem_type: ProblemType | None = HfArg(
        default=None,
        help='"multi_label_classification": labels are multi-hot, the full network has the binary cross-entropy '
        "and sub-networks the sum of the classes' KL divergences; None: what config.problem_type of a transformers "
        "model says, else one class for an image.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("kl_weight", self.kl_weight >= 0, "at least 0")
        if not 0 <= self.kl_warmup <= 1:
            raise ValueError(f"kl_warmup is {self.kl_warmup!r}; it must lie in [0, 1]")
        targets, problems = (", ".join(map(repr, choices)) for choices in (SUBNET_TARGETS, PROBLEM_TYPES))
        self._check("subnet_target", self.subnet_target in SUBNET_TARGETS, f"one of {targets}")
        self._check("problem_type", self.problem_type in (None, *PROBLEM_TYPES), f"None or one of {problems}")


@documented_by(ObjectiveSettings)
class GradAug:
    """The objective of GradAug (arXiv 2006.07989) for a training loop of one's own.

    The cross-entropy of the full network, plus for each sub-network the KL divergence from the full network's detached
    prediction to its own on transformed images. Only the full network's pass updates batch-norm statistics.

    In several processes the model is wrapped first: `GradAug(DistributedDataParallel(model))`.

    Args:
        model: a model in training mode, wrapped or not; made slimmable and droppable, as `subnet_mode` needs it, if
            it is not yet.
        label_smoothing: of the full network's cross-entropy, in [0, 1].
        criterion: returns the full network's loss, a scalar, from its logits (N, classes), float32 at least, and the
            labels, for example `nn.CrossEntropyLoss(weight=weights)`; None: the cross-entropy. Sub-networks go on
            learning the full network's prediction.
        teacher: another model, whose prediction the sub-networks learn in place of the full network's. It sees the
            whole images of the batch, alone and in evaluation mode, on their device, and gets no gradients.
        seed: of the sub-networks that are sampled.
        sampler: samples the sub-networks; the settings below that are about them then have no effect.
        transform: maps images (N, C, H, W) to those that a sub-network sees before they are resized.
        total_steps: number of optimiser steps of the training, at least 1; needed by `kl_warmup` alone.
        {fields}

    Raises:
        ValueError: a setting is out of its range or does not go with another, or blocks are to be dropped of a model
            that has none.

    Examples:
        >>> gradaug = GradAug(model, resolutions=[64, 56, 48])
        >>> for images, labels in loader:
        ...     optimizer.zero_grad()
        ...     loss = gradaug.backward(images, labels)
        ...     optimizer.step()
    """

    @spelled_by(ObjectiveSettings)
    def __init__(
        self,
        model: nn.Module,
        *,
        label_smoothing: float = 0.0,
        criterion: Loss | None = None,
        teacher: nn.Module | None = None,
        seed: int = 0,
        sampler: SubnetSampler | None = None,
        transform: ImageTransform | None = None,
        total_steps: int | None = None,
        **settings: Any,
    ) -> None:
        own = ObjectiveSettings(**settings)
        if own.kl_warmup > 0 and not (total_steps and total_steps >= 1):
            raise ValueError(f"total_steps is {total_steps!r}; with kl_warmup it must be at least 1")
        self.sampler = sampler or SubnetSampler(**taken_from(SubnetSettings, own), seed=seed)
        self._use_default_resolutions = sampler is None and own.resolutions is None
        self.kl_weight = own.kl_weight
        self._rising_steps = own.kl_warmup * (total_steps or 0)
        self._warned_of_small_parts = False
        self.subnet_target = own.subnet_target
        self.transform = transform
        self.step = 0
        self.model = model
        warn_of_lone_gradients(model)
        network = model.module if isinstance(model, DistributedDataParallel) else model
        num_classes_of(network)  # raises before the first step if there are none
        self.problem = problem_of(network, own.problem_type)
        self.criterion = criterion_of(self.problem, criterion, label_smoothing)
        if teacher is not None:
            check_teacher(teacher, network, own.subnet_target)
        self.teacher = teacher
        mode = getattr(self.sampler, "subnet_mode", "width")
        if mode == "tokens":
            find_tokens(network)
        if (drops_channels(mode) or mode == "tokens") and not is_slimmable(network):
            make_slimmable(network)
        if drops_blocks(mode) and not num_droppable_blocks(network):
            make_droppable(network)

    @property
    def num_classes(self) -> int | None:
        """Return the number of classes that the model states, also after it got another classifier."""
        return num_classes_of(self.model.module if isinstance(self.model, DistributedDataParallel) else self.model)

    def loss(self, images: Tensor, labels: Tensor, step: int | None = None) -> Tensor:
        """Return the objective with the graphs of all passes, for one joint backward.

        Args:
            images: (N, C, H, W).
            labels: class indices (N,), or probabilities (N, classes), or multi-hot ones (N, classes).
            step: number of the optimiser step, from which the sub-networks follow; None counts the calls.

        Returns:
            A scalar.

        Raises:
            ValueError: images, labels or the model's logits have a wrong shape, or a label is out of range.
        """
        step = self._counted(step)
        return sum(p.loss for p in self.passes(images, labels, self._sample(images, step), step=step))

    def backward(
        self,
        images: Tensor,
        labels: Tensor,
        step: int | None = None,
        backward: Callable[[Tensor], Any] = Tensor.backward,
    ) -> Tensor:
        """Add the gradients of the objective pass by pass, so that only one graph is alive at a time.

        Args:
            images: (N, C, H, W).
            labels: class indices (N,), or probabilities (N, classes), or multi-hot ones (N, classes).
            step: number of the optimiser step, from which the sub-networks follow; None counts the calls.
            backward: runs the backward of one pass's loss, for example `accelerator.backward`.

        Returns:
            The objective, a scalar without a graph.

        Raises:
            ValueError: images, labels or the model's logits have a wrong shape, or a label is out of range.
        """
        parts = []
        step = self._counted(step)
        subnets = self._sample(images, step)
        with closing(self.passes(images, labels, subnets, step=step, direct=True)) as passes:
            for p in passes:
                backward(p.loss)
                parts.append(p.loss.detach())
        return sum(parts)

    def passes(
        self,
        images: Tensor,
        labels: Tensor,
        subnets: Sequence[Subnet],
        *,
        step: int | None = None,
        direct: bool = False,
        **inputs: Any,
    ) -> Iterator[Pass]:
        """Run the passes of one step, the full network's first.

        A sub-network stays in place until the next pass is asked for, so that layers which are computed anew in the
        backward (activation checkpointing) are so at its width. Exhaust or close the iterator to have the full network
        back.

        Args:
            images: (N, C, H, W).
            labels: class indices (N,), or probabilities (N, classes), or multi-hot ones (N, classes).
            subnets: the sub-networks.
            step: number of the optimiser step, needed by `kl_warmup` alone.
            direct: whether the backward of a sub-network's loss may add its gradients to `grad` of the parameters in
                place, which is quicker. It is not for `torch.autograd.grad`.
            inputs: further keyword arguments of the model. A sub-network of a part of the images gets that part of
                tensors, lists and tuples with N entries.

        Raises:
            ValueError: images, labels or the model's logits have a wrong shape, a label is out of range, or `step` is
                missing.
        """
        weight = self.weight_at(step)
        full = self._full_pass(images, labels, inputs)
        target = full.logits
        yield full
        del full
        if self.teacher is not None and subnets:
            target = taught(self.teacher, images, self.num_classes)
        for subnet in subnets:
            dropped = self._dropped_blocks(subnet)
            seen = self._seen(subnet, images, labels, target, inputs)
            adds = direct and not _carries_gradients(self.model)
            with (
                subnet_pass(self.model, subnet.width, dropped, adds),
                tokens_kept(self.model, subnet.tokens, subnet.seed),
            ):
                current = self._subnet_pass(*seen[:3], subnet, seen[3])
                yield replace(current, loss=weight * current.loss, subnet=subnet, dropped=dropped)
                del current

    def weight_at(self, step: int | None) -> float:
        """Return the weight of the sub-networks' losses in a step, which rises while `kl_warmup` says so.

        Args:
            step: number of the optimiser step; None only without `kl_warmup`.

        Raises:
            ValueError: the step is missing.
        """
        if self._rising_steps == 0:
            return self.kl_weight
        if step is None:
            raise ValueError("step is None; with kl_warmup the number of the optimiser step is needed")
        return self.kl_weight * min(1.0, step / self._rising_steps)

    def _seen(
        self, subnet: Subnet, images: Any, labels: Any, target: Tensor | None, inputs: dict[str, Any]
    ) -> tuple[Any, Any, Tensor | None, dict[str, Any]]:
        """Return the images, labels, target and further inputs of the part that a sub-network sees."""
        if subnet.part is None:
            return images, labels, target, inputs
        size = len(labels)
        indices = subnet.part.indices(size)
        self._warn_of_small_parts(len(indices), size)
        part = {name: _taken(value, indices) if _has_length(value, size) else value for name, value in inputs.items()}
        return _taken(images, indices), _taken(labels, indices), _taken(target, indices), part

    def _warn_of_small_parts(self, size: int, batch_size: int) -> None:
        if size >= FEW_IMAGES or self._warned_of_small_parts or not _normalises_batches(self.model):
            return
        self._warned_of_small_parts = True
        warnings.warn(
            f"a sub-network sees {size} of the {batch_size} images of a batch, and batch norm's statistics of fewer "
            f"than {FEW_IMAGES} are noisy; use larger batches, fewer sub-networks or a larger subnet_images",
            stacklevel=4,
        )

    def _full_pass(self, images: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Pass:
        """Run the full network's pass; its logits are the target of the sub-networks."""
        check_images(images)
        logits = logits_of(self.model(images, **inputs), len(labels), self.num_classes)
        return Pass(self.criterion(logits, labels), logits.detach())

    def _subnet_pass(
        self, images: Tensor, labels: Tensor, target: Tensor, subnet: Subnet, inputs: dict[str, Any]
    ) -> Pass:
        """Run a sub-network's pass, with the model at its width."""
        transformed = transform_for_subnet(images, subnet, self.transform)
        logits = logits_of(self.model(transformed, **inputs), len(labels), self.num_classes)
        if self.subnet_target == "label":
            return Pass(self.criterion(logits, labels), logits.detach())
        return Pass(self.problem.subnet_loss(logits, target), logits.detach())

    def _dropped_blocks(self, subnet: Subnet) -> frozenset[int]:
        if subnet.survival == 1:
            return frozenset()
        num_blocks = num_droppable_blocks(self.model)
        if not num_blocks:
            raise ValueError(
                f"a sub-network has survival {subnet.survival!r}, but no block of {type(self.model).__name__} can be "
                "dropped: call gradaug_hf.slimming.depth.make_droppable(model) first"
            )
        return subnet.dropped_blocks(num_blocks)

    def _counted(self, step: int | None) -> int:
        """Return the number of the step; where none is given, that of the call."""
        if step is None:
            step = self.step
            self.step += 1
        return step

    def _sample(self, images: Tensor, step: int) -> list[Subnet]:
        if self._use_default_resolutions:
            check_images(images)
            self.sampler.resolutions = tuple(self._default_resolutions(images.shape[2:]))
            self._use_default_resolutions = False
        return self.sampler.sample(step)

    def _default_resolutions(self, shape: Sequence[int]) -> list[int]:
        """Return the default resolutions for images of a shape, those that the model can take if it can be tried."""
        side = min(shape)
        if not _is_sharded(self.model):
            with random_states_kept():
                trial = ResolutionTrial(extract_model_from_parallel(self.model), shape=shape)
                if trial.error_at(side) is None:
                    return trial.default(side)
        return default_resolutions(side)


def _has_length(value: Any, length: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == length
    return isinstance(value, (list, tuple)) and len(value) == length


def _taken(values: Any, indices: Sequence[int]) -> Any:
    """Return some entries of a tensor, in its memory format, or of a sequence."""
    if values is None:
        return None
    if not isinstance(values, Tensor):
        return type(values)(values[index] for index in indices)
    taken = values[torch.tensor(indices, device=values.device)]
    is_channels_last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return taken.contiguous(memory_format=torch.channels_last) if is_channels_last else taken


def _normalises_batches(model: nn.Module) -> bool:
    """Return whether a model has batch norm that takes the statistics of its process's images."""
    synchronised = (nn.SyncBatchNorm, CpuSyncBatchNorm)
    return any(isinstance(m, _BatchNorm) and m.training and not isinstance(m, synchronised) for m in model.modules())


def warn_of_lone_gradients(model: nn.Module) -> None:
    """Warn where several processes train and nothing carries a model's gradients from one to the other."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not _is_wrapped(model):
        warnings.warn(
            f"{dist.get_world_size()} processes train, but this {type(model).__name__} is not wrapped, so that each "
            "trains a model of its own; if it is a part of a wrapped model, give GradAug that one: "
            "GradAug(DistributedDataParallel(model))",
            stacklevel=3,
        )


def _is_wrapped(model: nn.Module) -> bool:
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    return not classes.isdisjoint(WRAPPERS) or _is_sharded(model)


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(each, "device_mesh") for each in model.parameters())


def _carries_gradients(model: nn.Module) -> bool:
    """Return whether the backward of the next pass carries gradients from one process to the others."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return model.require_backward_grad_sync if isinstance(model, DistributedDataParallel) else _is_wrapped(model)
