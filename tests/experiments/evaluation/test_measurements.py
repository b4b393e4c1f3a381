import json
from pathlib import Path

import pytest
import torch

from gradaug_hf.experiments.evaluation.measurements import Measurements

CPU = torch.device("cpu")
SETTINGS = {"seed": 0, "dataset_name": "photos"}


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "out" / "measured.json"


def test_what_was_measured_is_there_when_the_run_is_started_again(file):
    first = Measurements(file, SETTINGS, {"a": "1", "b": "2"}, CPU)
    assert first.without("clean") == ["a", "b"]
    first.add("clean", {"a": 0.25})
    again = Measurements(file, SETTINGS, {"a": "1", "b": "2"}, CPU)
    assert again.without("clean") == ["b"]
    assert again.of("a") == {"clean": 0.25}
    again.add("clean", {"b": {"top1": 0.5}})
    content = json.loads(file.read_text())
    assert content["models"]["b"] == {"weights": "2", "measured": {"clean": {"top1": 0.5}}}
    assert content["settings"] == SETTINGS
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_model_whose_weights_changed_is_measured_anew(file):
    Measurements(file, SETTINGS, {"a": "1", "b": "2"}, CPU).add("clean", {"a": 0.25, "b": 0.5})
    again = Measurements(file, SETTINGS, {"a": "9", "b": "2"}, CPU)
    assert again.without("clean") == ["a"]


def test_measurements_of_other_models_stay_in_the_file(file):
    Measurements(file, SETTINGS, {"a": "1"}, CPU).add("clean", {"a": 0.25})
    Measurements(file, SETTINGS, {"b": "2"}, CPU).add("clean", {"b": 0.5})
    assert Measurements(file, SETTINGS, {"a": "1"}, CPU).of("a") == {"clean": 0.25}


def test_measurements_with_other_settings_are_never_mixed(file):
    Measurements(file, SETTINGS, {"a": "1"}, CPU).add("clean", {"a": 0.25})
    with pytest.raises(ValueError, match=r"measured.json holds measurements with seed 0, not 1; give another output_"):
        Measurements(file, {**SETTINGS, "seed": 1}, {"a": "1"}, CPU)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": {}, "models": {"a": {}}}'])
def test_a_file_of_something_else_is_named_and_left_alone(file, content: str):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(ValueError, match=r"measured.json does not hold measurements to go on with"):
        Measurements(file, SETTINGS, {"a": "1"}, CPU)
    assert file.read_text() == content


def test_one_process_alone_writes(file):
    Measurements(file, SETTINGS, {"a": "1"}, CPU, writes=False).add("clean", {"a": 0.25})
    assert not file.exists()
