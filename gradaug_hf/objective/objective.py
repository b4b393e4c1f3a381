"""The GradAug objective: the full network learns the labels, its sub-networks learn from the full network."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradaug_hf.objective.losses import check_logits, cross_entropy, soft_target_divergence
from gradaug_hf.objective.resolutions import default_resolutions
from gradaug_hf.objective.sampling import Subnet, SubnetSampler, drops_blocks, drops_channels
from gradaug_hf.objective.transforms import ImageTransform, check_images, transform_for_subnet
from gradaug_hf.slimming import make_slimmable, subnet_pass
from gradaug_hf.slimming.depth import make_droppable
from gradaug_hf.slimming.patching import is_slimmable, num_droppable_blocks

SUBNET_TARGETS = ("soft", "label")
# Classes that carry gradients from one process to the others; those of parameters that do have a device mesh.
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}


@dataclass(frozen=True)
class Pass:
    """One forward pass of a step.

    Args:
        loss: its part of the objective, a scalar with its graph.
        logits: (N, classes), detached; None where an objective has none.
        subnet: the sub-network; None for the full network.
        dropped: indices of the residual blocks that it left out, among those that can be.
    """

    loss: Tensor
    logits: Tensor | None = None
    subnet: Subnet | None = None
    dropped: frozenset[int] = frozenset()


class GradAug:
    """The objective of GradAug (arXiv 2006.07989) for a training loop of one's own.

    The cross-entropy of the full network, plus for each sub-network the KL divergence from the full network's detached
    prediction to its own on transformed images. Only the full network's pass updates batch-norm statistics.

        gradaug = GradAug(model, resolutions=[224, 192, 160, 128])
        for images, labels in loader:
            optimizer.zero_grad()
            loss = gradaug.backward(images, labels)
            optimizer.step()

    In several processes the model is wrapped first: `GradAug(DistributedDataParallel(model))`.

    Args:
        model: a network in training mode, wrapped or not; made slimmable and droppable, as `subnet_mode` needs it, if
            it is not yet.
        num_subnets: number of sub-networks, at least 0.
        min_width: width multiplier of the narrowest sub-network, in (0, 1].
        max_width: upper end of the widths of the others, in [min_width, 1].
        resolutions: sides in pixels, one of which is drawn for each sub-network; None: 1, 6/7, 5/7 and 4/7 of the side
            of the first batch.
        width_levels: None draws widths uniformly from [min_width, max_width]; k draws from k evenly spaced ones.
        kl_weight: weight of the sub-networks' losses, at least 0.
        subnet_target: what sub-networks learn; "soft": the full network's prediction (in-place distillation), by KL
            divergence, "label": the labels, by cross-entropy.
        label_smoothing: of the full network's cross-entropy, in [0, 1].
        seed: of the sub-networks that are drawn.
        subnet_mode: what a sub-network leaves out; "width": its last channels, "depth": residual blocks at random,
            "width+depth": both.
        min_survival: with "depth", probability in (0, 1] with which the last residual block is kept; it falls linearly
            from 1 at the first.
        subnet_interval: k runs the sub-networks in steps 0, k, 2k and so on, and the full network alone in the others.
        sampler: draws the sub-networks; the settings above that are about them then have no effect.
        transform: maps images (N, C, H, W) to those that a sub-network sees before they are resized.

    Raises:
        ValueError: a setting is out of its range, or blocks are to be dropped of a network that has none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_subnets: int = 3,
        min_width: float = 0.9,
        max_width: float = 1.0,
        resolutions: Sequence[int] | None = None,
        width_levels: int | None = None,
        kl_weight: float = 1.0,
        subnet_target: str = "soft",
        label_smoothing: float = 0.0,
        seed: int = 0,
        subnet_mode: str = "width",
        min_survival: float = 0.8,
        subnet_interval: int = 1,
        sampler: SubnetSampler | None = None,
        transform: ImageTransform | None = None,
    ) -> None:
        if not kl_weight >= 0:
            raise ValueError(f"kl_weight is {kl_weight!r}; it must be at least 0")
        if subnet_target not in SUBNET_TARGETS:
            choices = ", ".join(map(repr, SUBNET_TARGETS))
            raise ValueError(f"subnet_target is {subnet_target!r}; it must be one of {choices}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {label_smoothing!r}; it must lie in [0, 1]")
        self.sampler = sampler or SubnetSampler(
            num_subnets,
            min_width,
            max_width,
            resolutions,
            width_levels,
            seed,
            subnet_mode,
            min_survival,
            subnet_interval,
        )
        self._use_default_resolutions = sampler is None and resolutions is None
        self.kl_weight = kl_weight
        self.subnet_target = subnet_target
        self.label_smoothing = label_smoothing
        self.transform = transform
        self.step = 0
        self.model = model
        warn_of_lone_gradients(model)
        network = model.module if isinstance(model, DistributedDataParallel) else model
        mode = getattr(self.sampler, "subnet_mode", "width")
        if drops_channels(mode) and not is_slimmable(network):
            make_slimmable(network)
        if drops_blocks(mode) and not num_droppable_blocks(network):
            make_droppable(network)

    def loss(self, images: Tensor, labels: Tensor, step: int | None = None) -> Tensor:
        """The objective with the graphs of all passes, for one joint backward.

        Args:
            images: (N, C, H, W).
            labels: class indices (N,), or probabilities (N, classes).
            step: number of the optimiser step, of which the sub-networks are a function; None counts the calls.

        Returns:
            A scalar.

        Raises:
            ValueError: images, labels or the network's logits have a wrong shape, or a label is out of range.
        """
        return sum(p.loss for p in self.passes(images, labels, self._sample(images, step)))

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
            labels: class indices (N,), or probabilities (N, classes).
            step: number of the optimiser step, of which the sub-networks are a function; None counts the calls.
            backward: runs the backward of one pass's loss, for example `accelerator.backward`.

        Returns:
            The objective, a scalar without a graph.

        Raises:
            ValueError: images, labels or the network's logits have a wrong shape, or a label is out of range.
        """
        parts = []
        with closing(self.passes(images, labels, self._sample(images, step))) as passes:
            for p in passes:
                backward(p.loss)
                parts.append(p.loss.detach())
        return sum(parts)

    def passes(self, images: Tensor, labels: Tensor, subnets: Sequence[Subnet], **inputs: Any) -> Iterator[Pass]:
        """Run the passes of one step, the full network's first.

        A sub-network stays in place until the next pass is asked for, so that layers which are computed anew in the
        backward (activation checkpointing) are so at its width. Exhaust or close the iterator to have the full network
        back.

        Args:
            images: (N, C, H, W).
            labels: class indices (N,), or probabilities (N, classes).
            subnets: the sub-networks.
            inputs: further keyword arguments of the network.
        """
        full = self._full_pass(images, labels, inputs)
        target = full.logits
        yield full
        del full
        for subnet in subnets:
            dropped = self._dropped_blocks(subnet)
            with subnet_pass(self.model, subnet.width, dropped):
                current = self._subnet_pass(images, labels, target, subnet, inputs)
                yield replace(current, subnet=subnet, dropped=dropped)
                del current

    def _full_pass(self, images: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Pass:
        """The full network's pass; its logits are the target of the sub-networks."""
        check_images(images)
        logits = logits_of(self.model(images, **inputs), len(labels))
        return Pass(cross_entropy(logits, labels, self.label_smoothing), logits.detach())

    def _subnet_pass(
        self, images: Tensor, labels: Tensor, target: Tensor, subnet: Subnet, inputs: dict[str, Any]
    ) -> Pass:
        """A sub-network's pass, with the model at its width."""
        transformed = transform_for_subnet(images, subnet, self.transform)
        logits = logits_of(self.model(transformed, **inputs), len(labels))
        return Pass(self.kl_weight * self._subnet_loss(logits, target, labels), logits.detach())

    def _subnet_loss(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        if self.subnet_target == "label":
            return cross_entropy(logits, labels, self.label_smoothing)
        return soft_target_divergence(logits, target)

    def _dropped_blocks(self, subnet: Subnet) -> frozenset[int]:
        num_blocks = num_droppable_blocks(self.model)
        if subnet.survival < 1 and not num_blocks:
            raise ValueError(
                f"a sub-network has survival {subnet.survival!r}, but no block of {type(self.model).__name__} can be "
                "dropped: call gradaug_hf.slimming.depth.make_droppable(model) first"
            )
        return subnet.dropped_blocks(num_blocks)

    def _sample(self, images: Tensor, step: int | None) -> list[Subnet]:
        if self._use_default_resolutions:
            check_images(images)
            self.sampler.resolutions = tuple(default_resolutions(min(images.shape[2:])))
            self._use_default_resolutions = False
        if step is None:
            step = self.step
            self.step += 1
        return self.sampler.sample(step)


def warn_of_lone_gradients(model: nn.Module) -> None:
    """Warn where several processes train and nothing carries a model's gradients from one to the other."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if classes.isdisjoint(WRAPPERS) and not any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        warnings.warn(
            f"{dist.get_world_size()} processes train, but this {type(model).__name__} is not wrapped, so that each "
            "trains a model of its own; if it is a part of a wrapped model, give GradAug that one: "
            "GradAug(DistributedDataParallel(model))",
            stacklevel=3,
        )


def logits_of(output: Any, batch_size: int) -> Tensor:
    """The logits in what a network returned: the tensor itself, `.logits`, or the first of a tuple.

    Args:
        output: of a timm network or a transformers classifier.
        batch_size: number of images.

    Raises:
        ValueError: there are none of shape (batch_size, classes).
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor):
        raise ValueError(f"the network returned a {type(output).__name__} without logits; expected a tensor of them")
    check_logits(logits, batch_size)
    return logits
