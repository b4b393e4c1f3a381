import json
from pathlib import Path

import pytest

from gradaug_hf.detection.arguments import parse as parse_detection
from gradaug_hf.detection.experiment import RECIPE
from gradaug_hf.experiments.arguments import parse
from gradaug_hf.experiments.recipes import CIFAR_WIDERESNET
from gradaug_hf.experiments.run import SETTINGS


def parsed(*argv: str):
    return parse({**SETTINGS, **CIFAR_WIDERESNET.settings}, CIFAR_WIDERESNET.methods, None, argv)


def parsed_detection(*argv: str):
    return parse_detection({**SETTINGS, **RECIPE}, None, argv)


def in_file(folder: Path, **settings) -> str:
    file = folder / "run.json"
    file.write_text(json.dumps(settings))
    return str(file)


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        ([], "outputs/wrn28_10-gradaug-seed42"),
        (["--method", "cutmix", "--seed", "3"], "outputs/wrn28_10-cutmix-seed3"),
        (
            ["--model", "timm/resnet18.a1_in1k@v1", "--method", "baseline"],
            "outputs/resnet18.a1_in1k@v1-baseline-seed42",
        ),
        (["--output_dir", "here"], "here"),
    ],
)
def test_a_run_has_a_folder_of_its_own_where_none_is_named(argv: list[str], folder: str):
    assert parsed(*argv)[1].output_dir == folder


def test_a_folder_that_a_file_leaves_open_is_that_of_the_run(tmp_path):
    assert parsed(in_file(tmp_path, output_dir=None))[1].output_dir == "outputs/wrn28_10-gradaug-seed42"


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        ([], "outputs/mask_rcnn-resnet50-plain-seed42"),
        (["--gradaug", "--detector", "faster_rcnn", "--backbone", "a/b"], "outputs/faster_rcnn-b-gradaug-seed42"),
    ],
)
def test_a_run_of_detection_has_a_folder_of_its_own(argv: list[str], folder: str):
    assert parsed_detection(*argv)[-1].output_dir == folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_subnets", "2"], "num_subnets is given, but gradaug is False"),
        (["--gradaug", "--num_subnets", "0"], "gradaug is True, but num_subnets is 0"),
        (["--coco_dir", ""], "coco_dir is ''; it must be a text that is not empty"),
        (["--anchor_scale", "inf"], "anchor_scale is inf; it must be above 0 and finite"),
        (["--max_size", "1000000"], "max_size is 1000000; it must be at most 4096 pixels"),
    ],
)
def test_settings_of_detection_that_have_no_effect_or_cannot_be_are_refused(argv: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        parsed_detection(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "baseline", "--num_subnets", "2"], "method is 'baseline', which trains without sub-networks"),
        (["--method", "gradaug", "--num_subnets", "0"], "num_subnets is 0, which turns it off"),
        (["--dataset_name", ""], "dataset_name is ''; it must be a text that is not empty"),
        (["--output_dir", " "], "output_dir is ' '; it must be the name of a folder"),
        (["--warmup_epochs", "inf"], "warmup_epochs is inf; it must be at least 0 and finite"),
        (["--warmup_epochs", "nan"], "warmup_epochs is nan"),
        (["--learning_rate", "nan"], "learning_rate is nan; it must be finite"),
        (["--resolutions", "1000000"], "resolutions is 1000000; it must be at most 4096 pixels"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(argv: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        parsed(*argv)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_width": None}, "min_width is null in the file; it must have a value"),
        ({"batch_size": []}, r"batch_size is \[\] in the file; it must have a value"),
        ({"resolutions": []}, "resolutions"),
        ({"method": "baseline", "min_width": 0.5}, "trains without sub-networks, but min_width is given"),
    ],
)
def test_an_empty_value_of_a_file_is_refused_where_a_setting_needs_one(tmp_path, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        parsed(in_file(tmp_path, **settings))


def test_an_empty_value_of_a_file_is_accepted_where_a_setting_may_be_empty(tmp_path):
    args, config = parsed(in_file(tmp_path, resolutions=None, eval_widths=[], labels_per_class=None))
    assert (config.resolutions, config.eval_widths, args.labels_per_class) == (None, [], None)
