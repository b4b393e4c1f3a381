"""The methods that the paper compares: what each sets, by name of the argument."""

from collections.abc import Mapping
from typing import Any

PLAIN = {"num_subnets": 0}
MIXUP = {"mixup_alpha": 1.0}  # arXiv 1710.09412
CUTMIX = {"cutmix_alpha": 1.0, "mix_prob": 0.5}  # arXiv 1905.04899

METHODS: dict[str, dict[str, Any]] = {
    "baseline": PLAIN,
    "dropblock": PLAIN | {"drop_block_rate": 0.1},  # arXiv 1810.12890
    "mixup": PLAIN | MIXUP,
    "cutmix": PLAIN | CUTMIX,
    "stochdepth": PLAIN | {"drop_path_rate": 0.5},  # arXiv 1603.09382
    "shakedrop": PLAIN | {"shake_drop_rate": 0.5},  # arXiv 1802.02375
    "bag_of_tricks": PLAIN  # arXiv 1812.01187
    | {
        "label_smoothing_factor": 0.1,
        "mixup_alpha": 0.2,
        "lr_scheduler_type": "cosine",
        "lr_drops": [],
        "warmup_epochs": 5,
        "zero_init_last": True,
    },
    "gradaug": {},
    "gradaug_cutmix": CUTMIX,
    "gradaug_mixup": MIXUP,
}
# Arguments that are passed to the constructor of the model.
NETWORK_ARGUMENTS = ("drop_path_rate", "drop_block_rate", "shake_drop_rate", "zero_init_last")
# Settings of mixing and of the model that a method may turn on.
MIXING = ("mixup_alpha", "cutmix_alpha")
# Settings that concern sub-networks alone, beside those whose names begin with `subnet_` or `kl_`.
OF_SUBNETS = ("num_subnets", "min_width", "max_width", "width_levels", "resolutions", "min_survival", "min_tokens")


def methods_with(**changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the methods by name, some of them with settings that a recipe has beside or instead of their own."""
    return {name: {**settings, **changes.get(name, {})} for name, settings in METHODS.items()}


def concerns_subnets(setting: str) -> bool:
    """Return whether a setting has an effect on sub-networks alone."""
    return setting in OF_SUBNETS or setting.startswith(("subnet_", "kl_"))


def trains_plainly(settings: Mapping[str, Any]) -> bool:
    """Return whether the settings of a method leave GradAug's sub-networks out."""
    return settings.get("num_subnets") == 0


def check_flags(method: str, methods: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> None:
    """Make sure that a run is the one that the name of its method says.

    Args:
        method: name of the method.
        methods: what each method sets.
        given: settings of the command line and the file, by name.

    Raises:
        ValueError: a setting contradicts the method; says which method goes with it.
    """
    own = methods[method]
    on = {name: value for name, value in given.items() if value not in (None, [], False, 0)}
    if trains_plainly(own):
        if vain := [name for name in on if concerns_subnets(name)]:
            raise ValueError(
                f"method is {method!r}, which trains without sub-networks, but {', '.join(vain)} is given; leave that "
                "out, or choose method 'gradaug'"
            )
        if other := [name for name in on if name in MIXING and not own.get(name)]:
            raise ValueError(
                f"method is {method!r}, but {other[0]} is {given[other[0]]!r}; leave that out, or choose method "
                f"{other[0].removesuffix('_alpha')!r}"
            )
    for name in ("num_subnets", *MIXING, *NETWORK_ARGUMENTS):
        turned_on = own.get(name) or (name == "num_subnets" and not trains_plainly(own))
        if turned_on and given.get(name, True) in (None, False, 0):
            raise ValueError(
                f"method is {method!r}, but {name} is {given[name]!r}, which turns it off; leave that out, or choose "
                "method 'baseline'"
            )


def check_method(
    method: str,
    methods: Mapping[str, Mapping[str, Any]],
    network_arguments: Mapping[str, Any],
    model: str,
    accepted: set[str],
) -> None:
    """Make sure that a model, which has `accepted` arguments, has the parts that a method regularises.

    Raises:
        ValueError: it lacks one that is on in `network_arguments`; names the methods that it can be trained by.
    """
    if missing := _missing(network_arguments, accepted):
        raise ValueError(
            f"{model} cannot be trained with method {method!r}: it has no {', '.join(missing)}. "
            f"Methods for it: {', '.join(methods_for(methods, accepted))}"
        )


def methods_for(methods: Mapping[str, Mapping[str, Any]], accepted: set[str]) -> list[str]:
    """Return the names of the methods that a model can be trained by, from the arguments that it accepts."""
    return [name for name, settings in methods.items() if not _missing(settings, accepted)]


def _missing(settings: Mapping[str, Any], accepted: set[str]) -> list[str]:
    return [name for name in NETWORK_ARGUMENTS if settings.get(name) and name not in accepted]
