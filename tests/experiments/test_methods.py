from dataclasses import fields

import pytest
from transformers import TrainingArguments

from gradaug_hf import GradAugConfig
from gradaug_hf.experiments.methods import METHODS, check_flags, concerns_subnets

# Own settings of GradAugConfig that have an effect on plain training, too.
OF_ALL_TRAINING = {
    "width_divisor",  # of the widths that are evaluated
    "channels_last",
    "sync_batchnorm",
    "mixup_alpha",
    "cutmix_alpha",
    "mix_prob",
    "eval_widths",
    "seed_train_data",
    "problem_type",
    "ignore_config_change",
}


def test_every_setting_is_known_to_concern_sub_networks_or_all_training():
    own = {f.name for f in fields(GradAugConfig)} - {f.name for f in fields(TrainingArguments)}
    undecided = {name for name in own if not concerns_subnets(name)} - OF_ALL_TRAINING
    assert not undecided, "name them in methods.OF_SUBNETS or here"
    assert not any(map(concerns_subnets, OF_ALL_TRAINING))
    assert concerns_subnets("subnet_rotation")


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (
            "baseline",
            {"num_subnets": 2},
            "method is 'baseline', which trains without sub-networks, but num_subnets is",
        ),
        ("cutmix", {"min_width": 0.5, "resolutions": [32]}, "but min_width, resolutions is given; .*method 'gradaug'"),
        ("stochdepth", {"subnet_rotation": True}, "but subnet_rotation is given"),
        ("baseline", {"mixup_alpha": 0.2}, "method is 'baseline', but mixup_alpha is 0.2; .*choose method 'mixup'"),
        ("mixup", {"cutmix_alpha": 1.0}, "method is 'mixup', but cutmix_alpha is 1.0; .*choose method 'cutmix'"),
        ("gradaug", {"num_subnets": 0}, "method is 'gradaug', but num_subnets is 0, which turns it off"),
        ("gradaug_cutmix", {"cutmix_alpha": 0.0}, "but cutmix_alpha is 0.0, which turns it off"),
        ("shakedrop", {"shake_drop_rate": None}, "but shake_drop_rate is None, which turns it off"),
        ("bag_of_tricks", {"zero_init_last": False}, "but zero_init_last is False, which turns it off"),
    ],
)
def test_a_setting_that_contradicts_the_method_is_refused(method: str, given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        check_flags(method, METHODS, given)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("baseline", {"num_subnets": 0, "subnet_rotation": False, "resolutions": None, "seed": 1}),
        ("baseline", {"drop_path_rate": 0.1}),  # many models are always trained so
        ("cutmix", {"cutmix_alpha": 0.5, "mix_prob": 1.0}),
        ("gradaug", {"num_subnets": 1, "min_width": 0.5, "mixup_alpha": 0.2}),
        ("stochdepth", {"drop_path_rate": 0.2}),
    ],
)
def test_settings_that_go_with_the_method_are_accepted(method: str, given: dict):
    check_flags(method, METHODS, given)
