import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from gradaug_hf.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "tests", "docs")
    shutil.copytree(ROOT, source, ignore=left_out)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_alone_and_all_of_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = [file for file in (ROOT / "gradaug_hf").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert held == {str(file.relative_to(ROOT)) for file in package}
    assert {"gradaug_hf/py.typed", "gradaug_hf/reports/model_card.md"} <= held


def test_wheel_has_the_version_of_the_package_and_its_console_script(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,), (scripts,) = (
            [archive.read(name).decode() for name in archive.namelist() if name.endswith(f".dist-info/{file}")]
            for file in ("METADATA", "entry_points.txt")
        )
    assert f"\nVersion: {__version__}\n" in metadata
    parser = ConfigParser()
    parser.read_string(scripts)
    assert dict(parser["console_scripts"]) == {"gradaug": "gradaug_hf.cli:main"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment of its own with the wheel, which borrows the dependencies of this one and not its package."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel],
        check=True,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # whose own .pth files are not read
    return folder


def run_alone(folder: Path, program: str, *arguments: str) -> str:
    """Return what a program of an environment prints, from a folder and with variables that know no other package."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    command = [folder / "bin" / program, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [("fine-tune",), ("train", "imagenet_resnet50")])
def test_an_installed_wheel_has_its_console_script(installed, command):
    (site,) = installed.glob("lib/python*/site-packages")
    where = "from importlib.util import find_spec; print(find_spec('gradaug_hf').origin)"
    found = run_alone(installed, "python", "-c", where)
    assert found.strip() == str(site / "gradaug_hf" / "__init__.py")
    assert "--num_subnets" in run_alone(installed, "gradaug", *command, "--help")


def test_top_level_of_the_package_has_at_most_four_modules():
    assert len(list((ROOT / "gradaug_hf").glob("*.py"))) <= 4


def test_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2006.07989"


def test_continuous_integration_calls_the_script_that_a_developer_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert workflow["jobs"]["tests"]["steps"][-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
