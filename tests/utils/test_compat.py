"""The package and its tests hold for every version that setup.cfg accepts; these hold for the installed one."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from setuptools.config.setupcfg import read_configuration

from gradaug_hf import GradAugConfig
from gradaug_hf.utils.compat import (
    ACTIVATION_CHECKPOINTING,
    compiles_stale_graphs,
    cpu_capabilities,
    has_static_graph,
    recompile_limits,
)

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "docs" / "environments.json"
# How code may ask for a version: of a module, of a package, and of an attribute that only some versions have.
ASKS_FOR_A_VERSION = (
    r"packaging|sys\.version|version_info|hasattr\((?:TrainingArguments|Trainer|transformers|torch[.\w]*|timm)\b"
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


def test_the_limits_of_recompilation_are_settings_of_torch():
    *limits, fails = recompile_limits()
    assert [type(getattr(torch._dynamo.config, name)) for name in (*limits, fails)] == [int, int, bool]


@pytest.mark.parametrize(
    ("by_versions", "python", "stale"),
    [(True, (3, 13, 0), True), (True, (3, 13, 1), False), (False, (3, 13, 0), False), (None, (3, 13, 0), False)],
)
def test_graphs_are_stale_by_versions_of_dictionaries_that_python_does_not_keep(
    monkeypatch, by_versions, python, stale
):
    found = {} if by_versions is None else {"use_recursive_dict_tags_for_guards": by_versions}
    monkeypatch.setattr(torch, "_dynamo", SimpleNamespace(config=SimpleNamespace(**found)))
    monkeypatch.setattr("sys.version_info", (*python, "final", 0))
    assert compiles_stale_graphs() is stale


def test_the_capabilities_of_the_processor_are_asked_one_by_one_where_torch_has_no_list(monkeypatch):
    found = {"_is_avx512_supported": True, "_is_avx512_bf16_supported": False, "_is_amx_tile_supported": True}
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**{name: lambda has=has: has for name, has in found.items()}))
    assert cpu_capabilities() == {"avx512_f": True, "avx512_bf16": False, "amx_bf16": True}


def test_nothing_else_looks_at_a_version():
    asking = {
        file.name for file in (ROOT / "gradaug_hf").rglob("*.py") if re.search(ASKS_FOR_A_VERSION, file.read_text())
    }
    assert asking == {"compat.py"}


def test_the_lowest_environment_that_was_tried_has_the_floors_of_setup_cfg():
    if "lowest" not in (tried := json.loads(ENVIRONMENTS.read_text()) if ENVIRONMENTS.exists() else {}):
        pytest.skip("the lowest environment has not been recorded: python .ci/environments.py --record lowest")
    options = read_configuration(ROOT / "setup.cfg")["options"]
    lines = [line for line in options["install_requires"] if not line.startswith("#")]
    floors = dict(re.fullmatch(r"([\w-]+)>=([\d.]+).*", line).groups() for line in lines)
    floors["python"] = str(options["python_requires"]).removeprefix(">=")
    lowest = tried["lowest"]
    names = [name for name in lowest if name in floors]
    assert len(names) >= 9
    assert not [name for name in names if not f"{lowest[name]}.".startswith(f"{floors[name]}.")]
