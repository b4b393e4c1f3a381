"""The package and its tests hold for every version that setup.cfg accepts; these hold for the installed one."""

import json
import re
import warnings
from pathlib import Path

import pytest
from setuptools.config.setupcfg import read_configuration

from gradaug_hf import GradAugConfig
from gradaug_hf.utils.compat import ACTIVATION_CHECKPOINTING, has_static_graph

ROOT = Path(__file__).parents[2]
# How code may ask for a version: of a module, of a package, and of an attribute that only some versions have.
ASKS_FOR_A_VERSION = (
    r"packaging|sys\.version|version_info|hasattr\((?:TrainingArguments|Trainer|transformers|torch|timm)\b"
)


def test_activation_checkpointing_has_the_name_that_is_not_deprecated(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = GradAugConfig(str(tmp_path), **{ACTIVATION_CHECKPOINTING: True}, report_to="none")
    assert args.gradient_checkpointing  # which all versions know


@pytest.mark.parametrize("found", [{}, {"ddp_static_graph": None}, {"ddp_static_graph": False}])
def test_a_static_graph_is_off_where_there_is_no_such_setting(found):
    assert not has_static_graph(type("Arguments", (), found)())


def test_a_static_graph_is_seen():
    assert has_static_graph(type("Arguments", (), {"ddp_static_graph": True})())


def test_nothing_else_looks_at_a_version():
    asking = {
        file.name for file in (ROOT / "gradaug_hf").rglob("*.py") if re.search(ASKS_FOR_A_VERSION, file.read_text())
    }
    assert asking == {"compat.py"}


def test_the_lowest_environment_that_was_tried_has_the_floors_of_setup_cfg():
    options = read_configuration(ROOT / "setup.cfg")["options"]
    tried = json.loads((ROOT / "docs" / "environments.json").read_text())["lowest"]
    floors = dict(re.fullmatch(r"([\w-]+)>=([\d.]+).*", line).groups() for line in options["install_requires"])
    floors["python"] = str(options["python_requires"]).removeprefix(">=")
    names = [name for name in tried if name in floors]
    assert len(names) >= 9
    assert not [name for name in names if not f"{tried[name]}.".startswith(f"{floors[name]}.")]
    assert tried["failed"] == 0
