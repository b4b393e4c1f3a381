"""GradAugConfig: the settings of GradAugTrainer."""

from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from gradaug_hf.objective.objective import ObjectiveSettings
from gradaug_hf.trainer.ranges import check_ranges, check_side
from gradaug_hf.utils.environment import public_text
from gradaug_hf.utils.launch import check_processes, meets_on_cpu
from gradaug_hf.utils.settings import documented_by

SubnetBackward = Literal["sequential", "joint"]
SUBNET_BACKWARDS = get_args(SubnetBackward)


@documented_by(besides=TrainingArguments)
@dataclass
class GradAugConfig(ObjectiveSettings, TrainingArguments):
    """Settings of GradAugTrainer: the following, and those of `transformers.TrainingArguments`.

    Training on images needs three defaults that differ from `TrainingArguments`: `remove_unused_columns=False`,
    `ddp_find_unused_parameters=False` and `ddp_broadcast_buffers=False`. A fourth is `logging_nan_inf_filter=False`: a
    loss that is not finite ends the training, and to look at it in each step would make an accelerator wait.

    Args:
        {fields}

    Raises:
        ValueError: a field is out of its range, or `accelerate launch --cpu` started one process of several.

    Examples:
        >>> args = GradAugConfig("out", num_subnets=3, min_width=0.9, resolutions=[224, 192, 160, 128])
    """

    width_divisor: int = HfArg(
        default=1,
        help="Channel counts are rounded to the nearest multiple of it, at least 1; 1 is exact to the paper, 8 "
        "suits tensor cores.",
    )
    channels_last: bool = HfArg(
        default=False, help="Whether the model's weights lie in channels-last memory, which makes convolutions faster."
    )
    subnet_backward: SubnetBackward = HfArg(
        default="sequential",
        help='"sequential" runs the backward of each pass before the next one, in the memory of plain training; '
        '"joint" runs one for all of them.',
    )
    sync_batchnorm: bool = HfArg(
        default=False,
        help="Whether batch norm takes its statistics from the whole batch of all processes, in sub-networks too.",
    )
    mixup_alpha: float = HfArg(
        default=0.0, help="Parameter of Mixup's beta distribution, at least 0; 0 turns Mixup off."
    )
    cutmix_alpha: float = HfArg(
        default=0.0, help="Parameter of CutMix's beta distribution, at least 0; 0 turns CutMix off."
    )
    mix_prob: float = HfArg(default=1.0, help="Probability with which a batch is mixed, in [0, 1].")
    eval_widths: list[float] = HfArg(
        default_factory=list,
        help="Width multipliers at which evaluate() measures as well, with recalibrated batch norm; each in (0, 1].",
    )
    seed_train_data: bool = HfArg(
        default=True,
        help="Whether the random numbers that a map-style training set takes from Python, NumPy and torch are a "
        "function of seed, epoch and index, so that a training can be resumed exactly.",
    )
    ignore_config_change: bool = HfArg(
        default=False, help="Whether to resume from a checkpoint that was trained with other settings."
    )
    logging_nan_inf_filter: bool = HfArg(
        default=False, help="Whether to log other losses in place of ones that are not finite, looked at in each step."
    )
    remove_unused_columns: bool = HfArg(
        default=False, help="Whether to remove columns that the model's forward does not name."
    )
    ddp_find_unused_parameters: bool | None = HfArg(
        default=False, help="Passed to DistributedDataParallel; every pass uses every parameter."
    )
    ddp_broadcast_buffers: bool | None = HfArg(
        default=False, help="Passed to DistributedDataParallel; each step has several forward passes."
    )

    def __post_init__(self) -> None:
        check_ranges(self, GradAugConfig)
        ObjectiveSettings.__post_init__(self)
        for side in self.resolutions or ():
            check_side("resolutions", side)
        backwards = ", ".join(map(repr, SUBNET_BACKWARDS))
        self._check("subnet_backward", self.subnet_backward in SUBNET_BACKWARDS, f"one of {backwards}")
        self._check("width_divisor", isinstance(self.width_divisor, int) and self.width_divisor >= 1, "at least 1")
        for name in ("mixup_alpha", "cutmix_alpha"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("mix_prob", 0 <= self.mix_prob <= 1, "in [0, 1]")
        self._check("eval_widths", all(0 < width <= 1 for width in self.eval_widths), "a list of widths in (0, 1]")
        check_processes()
        self.use_cpu = self.use_cpu or meets_on_cpu()
        TrainingArguments.__post_init__(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields to pickle to `training_args.bin`, which is pushed: no token, no folders of the machine."""
        public = {name: public_text(value) for name, value in vars(self).items() if type(value) is str}
        return vars(self) | public | {"hub_token": None}

    def __copy__(self) -> "GradAugConfig":
        return self._with_state(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradAugConfig":
        return self._with_state(deepcopy(vars(self), memo))

    def _with_state(self, state: dict[str, Any]) -> "GradAugConfig":
        """Return a copy, which keeps the token that a pickle leaves out."""
        other = object.__new__(type(self))
        vars(other).update(state)
        return other


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
