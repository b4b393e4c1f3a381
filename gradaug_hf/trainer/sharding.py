"""FSDP2: the parameters of a model are divided among the processes, and gathered for a pass block by block."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradaug_hf.hub.configs import timm_network
from gradaug_hf.slimming.depth import residual_blocks
from gradaug_hf.slimming.widths import accept_wrappers
from gradaug_hf.trainer.checkpoints import ResumeError
from gradaug_hf.trainer.config import GradAugConfig

LAUNCH = "accelerate launch --config_file recipes/accelerate/fsdp2.yaml SCRIPT"
# What a checkpoint has to hold, by how its tensors are stored.
WHOLE_FILES = ("pytorch_model_fsdp.bin", "optimizer.bin")
DIVIDED_FILES = ("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata")


def is_sharded(accelerator: Accelerator) -> bool:
    """Return True if the parameters of a model that is trained are divided by FSDP2."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and plugin.fsdp_version == 2


def check_version(args: GradAugConfig) -> None:
    """Raise a ValueError if settings, before a Trainer is made of them, ask for FSDP1 or tensor parallelism."""
    if args.parallelism_config:
        raise ValueError(
            "parallelism_config is given, but tensor parallelism splits single layers, which sub-networks take their "
            "slices of; leave it out"
        )
    config = args.fsdp_config if args.fsdp and isinstance(args.fsdp_config, dict) else {}
    version = config.get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", 1)
    if _is_asked_for(args) and int(version) != 2:
        raise _fsdp1()


def check_sharding(args: GradAugConfig, accelerator: Accelerator, model: nn.Module) -> None:
    """Raise a ValueError if sub-networks cannot be trained with the parameters of a model divided as is asked for."""
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            "DeepSpeed's ZeRO-3 splits the tensors that sub-networks take their slices of; use its stage 1 or 2, or "
            f"FSDP2: {LAUNCH}"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if _is_asked_for(args):
            raise ValueError(
                "FSDP is asked for, but accelerate divides no parameters among processes on the CPU, nor within one "
                "process; start several with an accelerator each, or leave FSDP out"
            )
        return
    if plugin.fsdp_version != 2:
        raise _fsdp1()
    if args.torch_compile:
        raise ValueError("torch_compile is True, which was not tried with sub-networks under FSDP2; leave it out")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is true, with which accelerate divides no model that has buffers or "
            "parameters of its own beside its layers'; set it false"
        )
    has_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    if accelerator.mixed_precision != "no" and has_norms:
        raise ValueError(
            f"mixed precision is {accelerator.mixed_precision!r}, in which FSDP2 gives batch norm its weights and not "
            f"its statistics, and {type(model).__name__} has batch norm; leave it out"
        )
    if plugin.activation_checkpointing and (name := _not_repeatable(model)):
        raise ValueError(
            "fsdp_activation_checkpointing is true, which computes layers again with other random numbers and counts "
            f"a batch twice in batch norm, and {name} has either; set it false, and for a timm model call "
            "model.set_grad_checkpointing()"
        )


def _is_asked_for(args: GradAugConfig) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _fsdp1() -> ValueError:
    return ValueError(
        "FSDP1 joins parameters to flat ones, which have no channels that sub-networks could take; set fsdp_version "
        f"to 2: {LAUNCH}"
    )


def _not_repeatable(model: nn.Module) -> str | None:
    """Return the name of a layer that samples random numbers or writes statistics, or None."""
    for name, module in model.named_modules():
        is_random = (isinstance(module, _DropoutNd) and module.p > 0) or getattr(module, "drop_prob", None)
        if is_random or isinstance(module, _BatchNorm):
            return name
    return None


def keep_contiguous(args: GradAugConfig, accelerator: Accelerator) -> None:
    """Turn `channels_last` off under FSDP2, which takes contiguous parameters alone, and warn of it."""
    if args.channels_last and is_sharded(accelerator):
        args.channels_last = False
        warnings.warn("FSDP2 takes contiguous parameters alone, so that channels_last is turned off", stacklevel=3)


def plan_sharding(accelerator: Accelerator, model: nn.Module, num_subnets: int) -> None:
    """Have a model divided block by block, and the gradients of several passes, if there are, summed in float32."""
    plugin = accelerator.state.fsdp_plugin
    if not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in _blocks(model)})
    if num_subnets > 0 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model of transformers names itself, or the residual blocks of another or of timm's."""
    named = getattr(model, "_no_split_modules", None)
    if not named or timm_network(model) is not None:
        return [model.get_submodule(name) for name in residual_blocks(model)]
    # accelerate divides the embeddings by themselves, and fails where they are in a block.
    embeddings = model.get_input_embeddings()
    blocks = [module for module in model.modules() if type(module).__name__ in named]
    return [block for block in blocks if all(module is not embeddings for module in block.modules())]


@contextmanager
def gradients_held_back(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Keep the gradients of a pass in this process, so that they cross with those of the last pass.

    Under FSDP2 they are whole until then. Where that is too much memory, `sync_each_batch` of accelerate's
    `gradient_accumulation_kwargs` has each pass's cross.
    """
    if not is_sharded(accelerator):
        with accelerator.no_sync(model):
            yield
    elif accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        yield
    else:  # accelerate's no_sync would let the last pass cross amid an accumulation
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(accelerator.sync_gradients)


class ShardingCallback(TrainerCallback):
    """Let sub-networks run in a model whose blocks FSDP2 has wrapped for activation checkpointing."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the model as it is now for the one that was made slimmable."""
        accept_wrappers(kwargs["model"])


# ---- checkpoints ----


def stores_parts(accelerator: Accelerator) -> bool:
    """Return True if FSDP2 divides the model, and each process writes its part of a checkpoint."""
    return is_sharded(accelerator) and "SHARDED" in str(accelerator.state.fsdp_plugin.state_dict_type)


def check_parts(folder: Path, accelerator: Accelerator) -> None:
    """Raise a ResumeError if a checkpoint was written without FSDP2, or with another `fsdp_state_dict_type`."""
    for name in DIVIDED_FILES if stores_parts(accelerator) else WHOLE_FILES:
        if not (folder / name).is_file():
            kind = accelerator.state.fsdp_plugin.state_dict_type.name
            raise ResumeError(
                f"{folder} has no {name}, from which FSDP2 resumes with fsdp_state_dict_type {kind}; resume as the "
                "checkpoint was written"
            )
