import math

import pytest

from gradaug_hf import GradAugConfig
from gradaug_hf.trainer.ranges import check_side


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": math.nan}, "learning_rate is nan; it must be finite"),
        ({"learning_rate": math.inf}, "learning_rate is inf; it must be finite"),
        ({"learning_rate": -0.1}, "learning_rate is -0.1; it must be at least 0"),
        ({"weight_decay": math.nan}, "weight_decay is nan; it must be finite"),
        ({"num_train_epochs": -3}, "num_train_epochs is -3; it must be at least 0"),
        ({"num_train_epochs": math.inf}, "num_train_epochs is inf; it must be finite"),
        ({"kl_weight": math.inf}, "kl_weight is inf; it must be finite"),
        ({"mixup_alpha": math.nan}, "mixup_alpha is nan; it must be finite"),
        ({"adam_beta1": math.nan}, "adam_beta1 is nan; it must be finite"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan; it must be"),
        ({"label_smoothing_factor": 1.0}, r"label_smoothing_factor is 1.0; it must be in \[0, 1\)"),
        ({"label_smoothing_factor": -0.1}, "label_smoothing_factor is -0.1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; it must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be at least 1"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0; it must be at least 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1; it must be at least 0"),
        ({"min_width": None}, "min_width is None; it must be given"),
        ({"learning_rate": None}, "learning_rate is None; it must be at least 0"),
        ({"num_subnets": None}, "num_subnets is None; it must be given"),
        ({"output_dir": ""}, "output_dir is ''; it must be the name of a folder"),
        ({"resolutions": [32, 1_000_000]}, "resolutions is 1000000; it must be at most 4096 pixels"),
    ],
)
def test_a_setting_that_is_no_number_in_its_range_is_refused_by_name(settings: dict, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        GradAugConfig(**{"output_dir": "out", "use_cpu": True} | settings)


def test_a_gradient_may_be_measured_without_a_limit():
    assert GradAugConfig("out", use_cpu=True, max_grad_norm=math.inf).max_grad_norm == math.inf


def test_the_largest_side_is_accepted():
    check_side("resolutions", 4096)
