"""GradAugConfig: the settings of GradAugTrainer."""

from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from gradaug_hf.objective.objective import SUBNET_TARGETS
from gradaug_hf.objective.sampling import SubnetSampler
from gradaug_hf.utils.launch import check_processes, meets_on_cpu

SUBNET_BACKWARDS = ("sequential", "joint")


@dataclass
class GradAugConfig(TrainingArguments):
    """Settings of GradAugTrainer: the following, and those of `transformers.TrainingArguments`.

    Training on images needs three defaults that differ from `TrainingArguments`: `remove_unused_columns=False`,
    `ddp_find_unused_parameters=False` and `ddp_broadcast_buffers=False`. A fourth is `logging_nan_inf_filter=False`: a
    loss that is not finite ends the training, and to look at it in each step would make an accelerator wait.

    Args:
        num_subnets: Number of sub-networks in each training step, at least 0; 0 is plain training.
        min_width: Width multiplier of the narrowest sub-network, which is in every step; in (0, 1].
        max_width: Upper end of the widths that the other sub-networks draw; in [min_width, 1].
        resolutions: Sides in pixels, one of which is drawn for each sub-network; by default 1, 6/7, 5/7 and 4/7 of
            the input side.
        subnet_mode: What a sub-network leaves out of the network; "width": its last channels, "depth": residual
            blocks at random, "width+depth": both.
        min_survival: With "depth", probability with which a sub-network keeps the last residual block, in (0, 1]; it
            falls linearly from 1 at the first.
        subnet_interval: With k, sub-networks run in the steps 0, k, 2k and so on, and the full network alone in the
            others, which cost as much as plain training; at least 1.
        width_divisor: Channel counts are rounded to the nearest multiple of it, at least 1; 1 is exact to the paper,
            8 suits tensor cores.
        width_levels: Number of evenly spaced widths to draw from, at least 2; by default widths are drawn
            continuously, as in the paper.
        channels_last: Whether the network's weights lie in channels-last memory, which makes convolutions faster.
        kl_weight: Weight of the sub-networks' losses, at least 0.
        subnet_target: What sub-networks learn; "soft": the full network's prediction (in-place distillation), by KL
            divergence, "label": the labels, by cross-entropy.
        subnet_backward: "sequential" runs the backward of each pass before the next one, in the memory of plain
            training; "joint" runs one for all of them.
        sync_batchnorm: Whether batch norm takes its statistics from the whole batch of all processes, in sub-networks
            too.
        mixup_alpha: Parameter of Mixup's beta distribution, at least 0; 0 turns Mixup off.
        cutmix_alpha: Parameter of CutMix's beta distribution, at least 0; 0 turns CutMix off.
        mix_prob: Probability with which a batch is mixed, in [0, 1].
        eval_widths: Width multipliers at which evaluate() measures as well, with recalibrated batch norm; each in
            (0, 1].
        seed_train_data: Whether the random numbers that a map-style training set takes from Python, NumPy and torch
            are a function of seed, epoch and index, so that a training can be resumed exactly.
        ignore_config_change: Whether to resume from a checkpoint that was trained with other settings.

    Raises:
        ValueError: a field is out of its range, or `accelerate launch --cpu` started one process of several.
    """

    num_subnets: int = field(
        default=3,
        metadata={"help": "Number of sub-networks in each training step, at least 0; 0 is plain training."},
    )
    min_width: float = field(
        default=0.9,
        metadata={"help": "Width multiplier of the narrowest sub-network, which is in every step; in (0, 1]."},
    )
    max_width: float = field(
        default=1.0,
        metadata={"help": "Upper end of the widths that the other sub-networks draw; in [min_width, 1]."},
    )
    resolutions: list[int] | None = field(
        default=None,
        metadata={
            "help": (
                "Sides in pixels, one of which is drawn for each sub-network; by default 1, 6/7, 5/7 and 4/7 of "
                "the input side."
            )
        },
    )
    subnet_mode: str = field(
        default="width",
        metadata={
            "help": (
                'What a sub-network leaves out of the network; "width": its last channels, "depth": residual blocks '
                'at random, "width+depth": both.'
            )
        },
    )
    min_survival: float = field(
        default=0.8,
        metadata={
            "help": (
                'With "depth", probability with which a sub-network keeps the last residual block, in (0, 1]; it '
                "falls linearly from 1 at the first."
            )
        },
    )
    subnet_interval: int = field(
        default=1,
        metadata={
            "help": (
                "With k, sub-networks run in the steps 0, k, 2k and so on, and the full network alone in the others, "
                "which cost as much as plain training; at least 1."
            )
        },
    )
    width_divisor: int = field(
        default=1,
        metadata={
            "help": (
                "Channel counts are rounded to the nearest multiple of it, at least 1; 1 is exact to the paper, "
                "8 suits tensor cores."
            )
        },
    )
    width_levels: int | None = field(
        default=None,
        metadata={
            "help": (
                "Number of evenly spaced widths to draw from, at least 2; by default widths are drawn "
                "continuously, as in the paper."
            )
        },
    )
    channels_last: bool = field(
        default=False,
        metadata={
            "help": "Whether the network's weights lie in channels-last memory, which makes convolutions faster."
        },
    )
    kl_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the sub-networks' losses, at least 0."},
    )
    subnet_target: str = field(
        default="soft",
        metadata={
            "help": (
                'What sub-networks learn; "soft": the full network\'s prediction (in-place distillation), by KL '
                'divergence, "label": the labels, by cross-entropy.'
            )
        },
    )
    subnet_backward: str = field(
        default="sequential",
        metadata={
            "help": (
                '"sequential" runs the backward of each pass before the next one, in the memory of plain '
                'training; "joint" runs one for all of them.'
            )
        },
    )
    sync_batchnorm: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether batch norm takes its statistics from the whole batch of all processes, in sub-networks too."
            )
        },
    )
    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Parameter of Mixup's beta distribution, at least 0; 0 turns Mixup off."},
    )
    cutmix_alpha: float = field(
        default=0.0,
        metadata={"help": "Parameter of CutMix's beta distribution, at least 0; 0 turns CutMix off."},
    )
    mix_prob: float = field(
        default=1.0,
        metadata={"help": "Probability with which a batch is mixed, in [0, 1]."},
    )
    eval_widths: list[float] = field(
        default_factory=list,
        metadata={
            "help": (
                "Width multipliers at which evaluate() measures as well, with recalibrated batch norm; each in (0, 1]."
            )
        },
    )
    seed_train_data: bool = field(
        default=True,
        metadata={
            "help": (
                "Whether the random numbers that a map-style training set takes from Python, NumPy and torch are a "
                "function of seed, epoch and index, so that a training can be resumed exactly."
            )
        },
    )
    ignore_config_change: bool = field(
        default=False,
        metadata={"help": "Whether to resume from a checkpoint that was trained with other settings."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Whether to log other losses in place of ones that are not finite, looked at in each step."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to remove columns that the network's forward does not name."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel; every pass uses every parameter."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel; each step has several forward passes."}
    )

    def __post_init__(self) -> None:
        SubnetSampler(
            self.num_subnets,
            self.min_width,
            self.max_width,
            self.resolutions,
            self.width_levels,
            subnet_mode=self.subnet_mode,
            min_survival=self.min_survival,
            subnet_interval=self.subnet_interval,
        )
        for name, choices in (("subnet_backward", SUBNET_BACKWARDS), ("subnet_target", SUBNET_TARGETS)):
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}")
        self._check("width_divisor", isinstance(self.width_divisor, int) and self.width_divisor >= 1, "at least 1")
        for name in ("kl_weight", "mixup_alpha", "cutmix_alpha"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("mix_prob", 0 <= self.mix_prob <= 1, "in [0, 1]")
        self._check("eval_widths", all(0 < width <= 1 for width in self.eval_widths), "a list of widths in (0, 1]")
        check_processes()
        self.use_cpu = self.use_cpu or meets_on_cpu()
        super().__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields to pickle: all but the token, since `training_args.bin` is kept and pushed."""
        return vars(self) | {"hub_token": None}

    def __copy__(self) -> "GradAugConfig":
        return self._with_state(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradAugConfig":
        return self._with_state(deepcopy(vars(self), memo))

    def _with_state(self, state: dict[str, Any]) -> "GradAugConfig":
        """Return a copy, which keeps the token that a pickle leaves out."""
        other = object.__new__(type(self))
        vars(other).update(state)
        return other

    def _check(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")


def as_gradaug_config(args: TrainingArguments) -> GradAugConfig:
    """Return training arguments as a GradAugConfig, with its defaults for the fields that they do not have.

    Args:
        args: returned as they are if they are a GradAugConfig already. Else the defaults in which the classes
            differ are GradAugConfig's, where `args` has those of `TrainingArguments`. What else a subclass of
            `TrainingArguments` has stays readable by its name.
    """
    if isinstance(args, GradAugConfig):
        return args
    accepted = {f.name: f for f in fields(GradAugConfig) if f.init}
    plain = {f.name: f for f in fields(args) if f.name in accepted}
    own = [name for name, f in plain.items() if f.default != accepted[name].default]
    kept = {
        name: getattr(args, name) for name in plain if name not in own or getattr(args, name) != plain[name].default
    }
    config = GradAugConfig(**kept)
    vars(config).update({name: value for name, value in vars(args).items() if name not in vars(config)})
    return config
