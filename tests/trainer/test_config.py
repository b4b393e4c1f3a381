import copy
import inspect
import json
import pickle
import re
from dataclasses import dataclass, fields

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from gradaug_hf.trainer.config import GradAugConfig, as_gradaug_config

OWN_FIELDS = {
    "num_subnets": 3,
    "min_width": 0.9,
    "max_width": 1.0,
    "resolutions": None,
    "subnet_mode": "width",
    "min_survival": 0.8,
    "min_tokens": 0.5,
    "subnet_interval": 1,
    "subnet_images": 1.0,
    "kl_warmup": 0.0,
    "width_divisor": 1,
    "width_levels": None,
    "kl_weight": 1.0,
    "subnet_target": "soft",
    "problem_type": None,
    "subnet_backward": "sequential",
    "sync_batchnorm": False,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "mix_prob": 1.0,
    "eval_widths": [],
    "seed_train_data": True,
    "ignore_config_change": False,
    "channels_last": False,
}


def make(tmp_path, **settings) -> GradAugConfig:
    return GradAugConfig(str(tmp_path), report_to="none", **settings)


def test_the_own_fields_and_their_defaults(tmp_path):
    plain = {f.name for f in fields(TrainingArguments)}
    args = make(tmp_path)
    assert {f.name: getattr(args, f.name) for f in fields(args) if f.name not in plain} == OWN_FIELDS


def test_defaults_that_image_training_needs(tmp_path):
    args = make(tmp_path)
    assert args.remove_unused_columns is False
    assert args.ddp_find_unused_parameters is False
    assert args.ddp_broadcast_buffers is False
    assert args.logging_nan_inf_filter is False


def test_the_docstring_has_the_words_of_the_help():
    section = inspect.getdoc(GradAugConfig).split("Args:\n")[1].split("\n\nRaises:")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n      .*)*)", section, re.MULTILINE)
    described = {name: " ".join(text.split()) for name, text in entries}
    own = {f.name: f.metadata["help"] for f in fields(GradAugConfig) if f.name in OWN_FIELDS}
    assert described == own


def test_every_own_field_is_a_flag(tmp_path):
    line = (
        f"--output_dir {tmp_path} --num_subnets 2 --min_width 0.8 --max_width 0.95 --resolutions 32 28 "
        "--width_divisor 8 --width_levels 4 --kl_weight 0.5 --subnet_backward joint --mixup_alpha 0.2 "
        "--cutmix_alpha 1 --mix_prob 0.5 --eval_widths 0.9 0.8 --subnet_mode width+depth --min_survival 0.7 "
        "--subnet_interval 2 --ignore_config_change --sync_batchnorm --channels_last "
        "--subnet_target label --seed_train_data false --subnet_images split --kl_warmup 0.25 --min_tokens 0.4 "
        "--problem_type multi_label_classification"
    )
    (args,) = HfArgumentParser(GradAugConfig).parse_args_into_dataclasses(line.split())
    parsed = {name: getattr(args, name) for name in OWN_FIELDS}
    assert parsed == {
        "num_subnets": 2,
        "min_width": 0.8,
        "max_width": 0.95,
        "resolutions": [32, 28],
        "subnet_mode": "width+depth",
        "min_survival": 0.7,
        "subnet_interval": 2,
        "width_divisor": 8,
        "width_levels": 4,
        "kl_weight": 0.5,
        "subnet_target": "label",
        "problem_type": "multi_label_classification",
        "subnet_backward": "joint",
        "sync_batchnorm": True,
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
        "mix_prob": 0.5,
        "eval_widths": [0.9, 0.8],
        "seed_train_data": False,
        "ignore_config_change": True,
        "channels_last": True,
        "subnet_images": "split",
        "kl_warmup": 0.25,
        "min_tokens": 0.4,
    }


def test_the_help_can_be_printed():
    assert "--min_width" in HfArgumentParser(GradAugConfig).format_help()


def test_what_is_pickled_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = GradAugConfig(str(tmp_path / "runs" / "x"), resume_from_checkpoint="/far/away/checkpoint-3", use_cpu=True)
    content = pickle.dumps(args)
    assert str(tmp_path).encode() not in content and b"/far" not in content
    read = pickle.loads(content)
    assert (read.output_dir, read.resume_from_checkpoint) == ("runs/x", "checkpoint-3")
    assert copy.deepcopy(args).output_dir == copy.copy(args).output_dir == str(tmp_path / "runs" / "x")


def test_settings_survive_json_and_pickle(tmp_path):
    args = make(tmp_path, resolutions=[32, 28], eval_widths=[0.5])
    assert json.loads(args.to_json_string())["resolutions"] == [32, 28]
    assert pickle.loads(pickle.dumps(args)).eval_widths == [0.5]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_subnets": -1}, "num_subnets is -1; it must be an integer of at least 0"),
        ({"min_width": 0}, r"min_width is 0; it must lie in \(0, 1\]"),
        ({"min_width": 1.5}, "min_width is 1.5"),
        ({"max_width": 0.5}, "max_width is 0.5"),
        ({"resolutions": []}, r"resolutions is \[\]; .* non-empty"),
        ({"resolutions": [32, -4]}, r"resolutions is \[32, -4\]"),
        ({"subnet_mode": "height"}, "subnet_mode is 'height'; it must be one of 'width', 'depth', 'width\\+depth'"),
        ({"subnet_backward": "both"}, "subnet_backward is 'both'; it must be one of 'sequential', 'joint'"),
        ({"problem_type": "regression"}, "problem_type is 'regression'; it must be None or one of 'single_label_cl"),
        ({"subnet_target": "hard"}, "subnet_target is 'hard'; it must be one of 'soft', 'label'"),
        ({"min_survival": 0}, r"min_survival is 0; it must lie in \(0, 1\]"),
        ({"min_tokens": 1.2}, r"min_tokens is 1.2; it must lie in \(0, 1\]"),
        ({"subnet_interval": 0}, "subnet_interval is 0; it must be an integer of at least 1"),
        ({"subnet_images": 2}, r"subnet_images is 2; it must be 'split' or a share in \(0, 1\]"),
        ({"kl_warmup": -0.1}, r"kl_warmup is -0.1; it must lie in \[0, 1\]"),
        ({"width_divisor": 0}, "width_divisor is 0; it must be at least 1"),
        ({"width_levels": 1}, "width_levels is 1"),
        ({"kl_weight": -0.1}, "kl_weight is -0.1; it must be at least 0"),
        ({"mixup_alpha": -1}, "mixup_alpha is -1"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha is nan"),
        ({"mix_prob": 1.1}, r"mix_prob is 1.1; it must be in \[0, 1\]"),
        ({"eval_widths": [0.9, 0]}, r"eval_widths is \[0.9, 0\]; it must be a list of widths in \(0, 1\]"),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value_and_range(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


def test_plain_training_arguments_get_the_defaults(tmp_path):
    plain = TrainingArguments(
        str(tmp_path), learning_rate=0.3, report_to="none", ddp_broadcast_buffers=True, use_cpu=True
    )
    args = as_gradaug_config(plain)
    assert isinstance(args, GradAugConfig)
    assert {name: getattr(args, name) for name in OWN_FIELDS} == OWN_FIELDS
    assert (args.learning_rate, args.use_cpu, args.output_dir) == (0.3, True, str(tmp_path))
    assert args.remove_unused_columns is False
    assert args.ddp_find_unused_parameters is False
    assert args.ddp_broadcast_buffers is True
    assert as_gradaug_config(args) is args


@dataclass
class OwnArguments(TrainingArguments):
    my_flag: str = "unset"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settled = self.my_flag.upper()


@pytest.mark.parametrize("kind", [OwnArguments, Seq2SeqTrainingArguments])
def test_fields_of_a_subclass_of_training_arguments_stay_readable(tmp_path, kind):
    own = {"my_flag": "set"} if kind is OwnArguments else {"sortish_sampler": True}
    args = as_gradaug_config(kind(str(tmp_path), report_to="none", learning_rate=0.25, **own))
    assert isinstance(args, GradAugConfig)
    assert (args.learning_rate, args.num_subnets, args.remove_unused_columns) == (0.25, 3, False)
    for copied in (args, pickle.loads(pickle.dumps(args)), copy.deepcopy(args)):
        assert {name: getattr(copied, name) for name in own} == own
    assert kind is not OwnArguments or args.settled == "SET"
