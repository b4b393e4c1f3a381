"""The facts of a training that its model card shows, as text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerState

from gradaug_hf.hub.configs import timm_network
from gradaug_hf.objective.sampling import SubnetSampler, drops_blocks, drops_channels
from gradaug_hf.objective.transforms import ImageTransform
from gradaug_hf.reports.history import at_step
from gradaug_hf.reports.model_card import DataName, ModelFacts
from gradaug_hf.trainer.config import GradAugConfig
from gradaug_hf.utils.environment import device_name, launched_script, public_command

TARGETS = {"soft": "the full network's predictions", "label": "the labels"}


def model_facts(trainer: Trainer) -> ModelFacts:
    """Return the facts of a GradAugTrainer's model and training that a model card shows."""
    args, state = trainer.args, trainer.state
    best_was_loaded = args.load_best_model_at_end and not trainer.is_in_train and state.best_model_checkpoint
    step = state.best_global_step if best_was_loaded else state.global_step
    model, script = trainer.model, launched_script()
    timm_model = timm_network(model)
    trained, several_sets = state.global_step > 0, isinstance(trainer.eval_dataset, dict)
    subnets = ()
    if args.num_subnets > 0:
        subnets = subnet_facts(args, trainer.subnet_sampler, trainer.subnet_transform, trainer.teacher)
    return ModelFacts(
        name=Path(args.output_dir).absolute().name,
        architecture=type(model).__name__ if timm_model is None else timm_model.pretrained_cfg["architecture"],
        num_parameters=sum(p.numel() for p in model.parameters()),
        hub_id=trainer.hub_model_id,
        base=getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        data=data_facts(trainer.train_dataset, None if several_sets else trainer.eval_dataset),
        train_images=number_of_images(trainer.train_dataset),
        eval_images=None if several_sets else number_of_images(trainer.eval_dataset),
        classes=trainer.class_table,
        measured=at_step(trainer.evaluations, step),
        steps=state.global_step,
        subnets=dict(subnets) if trained else {},
        training=dict(training_facts(args, state, trainer.optimizer)) if trained else {},
        command=public_command(script) if trained and script else None,
    )


def subnet_facts(
    args: GradAugConfig, sampler: SubnetSampler, transform: ImageTransform | None, teacher: nn.Module | None = None
) -> Iterable[tuple[str, str]]:
    """Yield names and values of the settings of the sub-networks."""
    if type(sampler) is SubnetSampler:
        yield "sub-networks of a step", f"{sampler.num_subnets}"
        if sampler.subnet_interval > 1:
            yield "steps with sub-networks", f"one in {sampler.subnet_interval}"
        if drops_channels(sampler.subnet_mode):
            yield "width multipliers", _widths(sampler)
            yield "channels are multiples of", f"{args.width_divisor}"
        if drops_blocks(sampler.subnet_mode):
            yield "survival probability of the last residual block", f"{sampler.min_survival:g}"
        if sampler.subnet_mode == "tokens":
            yield "smallest share of the patches", f"{sampler.min_tokens:g}"
        if sampler.resolutions:
            yield "resolutions", " ".join(map(str, sampler.resolutions))
        if sampler.subnet_share < 1:
            yield "share of the images of a step", f"{sampler.subnet_share:.3g}"
    else:
        yield "sub-networks", f"sampled by a {type(sampler).__name__}"
    if transform is not None:
        yield "further transform of their images", type(transform).__name__
    taught = None if teacher is None else f"the predictions of another model, a {type(teacher).__name__}"
    yield "they learned", taught or TARGETS[args.subnet_target]
    rising = f", rising from 0 over {args.kl_warmup:.3g} of the steps" if args.kl_warmup else ""
    yield "weight of their losses", f"{args.kl_weight:g}{rising}"
    yield "backward", args.subnet_backward


def training_facts(args: GradAugConfig, state: TrainerState, optimizer: Optimizer | None) -> Iterable[tuple[str, str]]:
    """Yield names and values of steps, optimiser, seed, time and hardware of a training."""
    yield "steps", f"{state.global_step:,}"
    if state.epoch is not None:
        yield "epochs", f"{state.epoch:.4g}"
    yield "images in a step", f"{args.train_batch_size * args.world_size * args.gradient_accumulation_steps}"
    if optimizer is not None:
        yield "optimiser", _optimiser(optimizer)
    yield "learning rate schedule", args.lr_scheduler_type.value
    for name in ("label_smoothing_factor", "mixup_alpha", "cutmix_alpha", "max_grad_norm"):
        if getattr(args, name):
            yield name.replace("_", " "), f"{getattr(args, name):g}"
    if args.bf16 or args.fp16:
        yield "mixed precision", "bf16" if args.bf16 else "fp16"
    yield "seed", f"{args.seed}"
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    if seconds:
        yield "time since it was started or last resumed, evaluation included", f"{seconds[-1]:.1f} s"
    processes = f"{args.world_size} processes, each on " if args.world_size > 1 else ""
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    yield "hardware", f"{processes}{device_name(args.device)}{threads}"


def data_facts(train_dataset: Any, eval_dataset: Any) -> DataName:
    """Return the name on the Hub, as `datasets` noted it, of the dataset evaluated on, or else of that trained on."""
    infos = (getattr(dataset, "info", None) for dataset in (eval_dataset, train_dataset))
    info = next((info for info in infos if hasattr(info, "download_checksums")), None)
    sources = [name for name in getattr(info, "download_checksums", None) or {} if name.startswith("hf://datasets/")]
    split = getattr(eval_dataset, "split", None)
    held_out = split == getattr(train_dataset, "split", None)  # of the training images' own
    return DataName(
        hub_id=sources[0].removeprefix("hf://datasets/").partition("@")[0] if sources else None,
        config=getattr(info, "config_name", None),
        split=None if split is None or held_out else str(split),
    )


def number_of_images(dataset: Any) -> int | None:
    """Return the length of a dataset, or None for a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def _widths(sampler: SubnetSampler) -> str:
    if sampler.num_subnets == 1:
        return f"{sampler.min_width:g}"
    levels = "" if sampler.width_levels is None else f" from {sampler.width_levels} levels"
    others = f"{sampler.num_subnets - 1} sampled{levels} in [{sampler.min_width:g}, {sampler.max_width:g}]"
    return f"{sampler.min_width:g}, and {others}"


def _optimiser(optimizer: Any) -> str:
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
    groups = optimizer.param_groups
    rate = groups[0].get("initial_lr", groups[0]["lr"])
    settings = {"highest learning rate": rate, "weight decay": max(group.get("weight_decay", 0) for group in groups)}
    settings |= {name: groups[0][name] for name in ("momentum", "nesterov", "betas") if groups[0].get(name)}
    return ", ".join([kind, *(f"{name} {value}" for name, value in settings.items())])
