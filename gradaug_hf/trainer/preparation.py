"""The preparation of a model for its training: memory format, batch norm, and what its sub-networks leave out."""

import warnings

import torch
from torch import nn

from gradaug_hf.hub.weights import take_saved_names
from gradaug_hf.objective.problems import problem_of
from gradaug_hf.objective.sampling import drops_blocks, drops_channels
from gradaug_hf.slimming import make_slimmable, slicing_report
from gradaug_hf.slimming.depth import make_droppable
from gradaug_hf.slimming.sync_batchnorm import synchronise_batchnorm
from gradaug_hf.slimming.tokens import find_tokens
from gradaug_hf.trainer.batches import name_images
from gradaug_hf.trainer.config import GradAugConfig


def lay_out(model: nn.Module, args: GradAugConfig) -> None:
    """Give a model its memory format, its batch norm and its names for tensors, input and kind of classification."""
    take_saved_names(model)
    name_images(model)
    if args.problem_type is not None:
        problem_of(model, args.problem_type)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_batchnorm and args.world_size > 1:
        synchronise_batchnorm(model, args.device)


def make_subnets_possible(model: nn.Module, args: GradAugConfig, mode: str) -> None:
    """Make a model slimmable and droppable, as its sub-networks need it, and warn if less than half is sliced."""
    if mode == "tokens":
        find_tokens(model)
        make_slimmable(model, width_divisor=args.width_divisor)
    if drops_channels(mode):
        make_slimmable(model, width_divisor=args.width_divisor)
        if (sliced := slicing_report(model).sliced_macs) < 0.5:
            others = "images and their dropped blocks" if drops_blocks(mode) else "images"
            warnings.warn(
                f"{sliced:.0%} of {type(model).__name__} is sliced, so that its sub-networks differ from it by their "
                f"{others} {'mostly' if sliced else 'only'}; print(gradaug_hf.slicing_report(model)) says why",
                stacklevel=4,
            )
    if drops_blocks(mode):
        make_droppable(model)


def leave_out_anything(model: nn.Module, args: GradAugConfig) -> bool:
    """Return True if sub-networks leave out channels, blocks or patches of a slimmable model."""
    mode = args.subnet_mode
    narrower = drops_channels(mode) and slicing_report(model).sliced_macs > 0 and args.min_width < 1
    shorter = drops_blocks(mode) and args.min_survival < 1
    return narrower or shorter or (mode == "tokens" and args.min_tokens < 1)
