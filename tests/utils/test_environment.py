import sys
from types import ModuleType

import pytest
import torch

import gradaug_hf
from gradaug_hf.utils.environment import device_name, launched_script, public_command, public_settings, versions

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["recipes/x.py", "--seed", "3"], "recipes/x.py --seed 3"),
        (["/home/me/recipes/x.py", "--output_dir", "/scratch/me/run 1"], "x.py --output_dir 'run 1'"),
        (["x.py", "--dataset_name=../private/flowers/"], "x.py --dataset_name=flowers"),
        (["x.py", "--model", "~/nets/best", "--dataset_name", "uoft-cs/cifar10"], None),
        (["x.py", "--hub_token", TOKEN, "--hub_model_id", "me/net"], "x.py --hub_model_id me/net"),
        (["x.py", f"--push_to_hub_token={TOKEN}", "--seed", "1"], "x.py --seed 1"),
        (["x.py", "--hub_token", "--seed", "1"], "x.py --seed 1"),
        (["x.py", "--trackio_space_id", TOKEN], "x.py --trackio_space_id hf_..."),
        (["x.py", "--accelerator_config", '{"a": "/etc/a.json"}'], """x.py --accelerator_config '{"a": "a.json"}'"""),
        (["x.py", "--dataset_name", "https://example.org/a/b"], "x.py --dataset_name https://example.org/a/b"),
    ],
)
def test_a_command_is_shown_without_tokens_and_folders_of_the_machine(argv: list[str], shown: str | None):
    assert public_command(argv) == (shown or "x.py --model best --dataset_name uoft-cs/cifar10")


def test_settings_are_shown_with_paths_below_the_working_folder_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "output_dir": str(tmp_path / "outputs" / "run 1"),
        "dataset_name": "/data/my pictures/cats",
        "model": "uoft-cs/net",
        "nested": {"paths": ["~/a", "../b/c", "d/e"], "rate": 0.1, "none": None},
        "text": f"see {tmp_path}/log.txt",
    }
    assert public_settings(settings) == {
        "output_dir": "outputs/run 1",
        "dataset_name": "cats",
        "model": "uoft-cs/net",
        "nested": {"paths": ["a", "c", "d/e"], "rate": 0.1, "none": None},
        "text": "see log.txt",
    }


@pytest.mark.parametrize("is_script", [True, False])
def test_a_script_is_known_and_an_interactive_session_has_none(is_script: bool, monkeypatch):
    main = ModuleType("__main__")
    if is_script:
        main.__file__ = "x.py"
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["x.py", "--seed", "1"])
    assert launched_script() == (["x.py", "--seed", "1"] if is_script else None)


def test_versions_and_processor_are_those_of_this_process():
    assert versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions()["gradaug_hf"] == gradaug_hf.__version__
    assert device_name(torch.device("cpu"))
