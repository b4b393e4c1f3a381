import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from setuptools.config.setupcfg import read_configuration

import gradaug_hf
from gradaug_hf.cli import main as gradaug
from tests.helpers.pages import PAGES, README, ROOT, blocks, commands

# The recipe that these start, whose flags they take too.
STARTS = {"recipes/low_data.py": "recipes/cifar_wideresnet.py", "gradaug sweep": "recipes/cifar_wideresnet.py"}


@pytest.fixture(scope="session")
def after_readme(tmp_path_factory) -> tuple[Path, dict]:
    """A folder with `photos`, in which the README's blocks have run, and their names, with which the pages go on."""
    folder = tmp_path_factory.mktemp("pages")
    for split, number in (("train", 4), ("validation", 2)):
        for colour in ("red", "blue"):
            (folder / "photos" / split / colour).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (40, 36), colour).save(folder / "photos" / split / colour / f"{i}.png")
    return folder, run_blocks(README, folder, {})


def run_blocks(page: Path, folder: Path, names: dict) -> dict:
    names = {**names, "__name__": page.stem}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, block in enumerate(blocks(page, "python")):
            exec(compile(block, f"{page.name}, python block {number}", "exec"), names)
    return names


def test_python_blocks_of_the_readme_run_as_written(after_readme):
    folder, names = after_readme
    assert len(blocks(README, "python")) >= 3
    assert (folder / "digits" / "model.safetensors").is_file()
    assert names["subnet"].num_classes == 10


@pytest.mark.parametrize("page", [p for p in PAGES[1:] if blocks(p, "python")], ids=lambda page: page.stem)
def test_python_blocks_of_a_page_run_as_written(page, after_readme):
    run_blocks(page, *after_readme)


@cache
def help_of(program: str) -> str:
    """What a script, or a subcommand of `gradaug`, prints with --help."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        lines: list[str] = []
        patch.setattr(sys.stdout, "write", lines.append)
        if program.startswith("gradaug "):
            gradaug([program.split()[1], "--help"])
        else:
            patch.setattr(sys, "argv", [program, "--help"])
            patch.syspath_prepend((ROOT / program).parent)
            runpy.run_path(str(ROOT / program), run_name="__main__")
    assert not end.value.code
    return "".join(lines)


def check_command(words: list[str]) -> None:
    """Make sure that a command starts what there is, with flags that it knows."""
    program, *rest = words
    if program == "accelerate":
        launched = launch_command_parser().parse_args(rest[1:])
        assert launched.config_file is None or (ROOT / launched.config_file).is_file()
        program, rest = launched.training_script, launched.training_script_args
    elif program == "gradaug":
        program = f"recipes/{rest[1]}.py" if rest[0] == "train" else f"gradaug {rest[0]}"
        rest = rest[1:]
    elif program == "python" and rest[0].endswith(".py"):
        program, rest = rest[0], rest[1:]
    elif "pip" in program:
        return check_extras(words[-1])
    if program.endswith(".py") or program.startswith("gradaug "):
        known = help_of(program) + (help_of(STARTS[program]) if program in STARTS else "")
        for flag in [word for word in rest if word.startswith("--")]:
            assert re.search(rf"{flag}\b", known), f"{program} has no {flag}"


def check_extras(package: str) -> None:
    extras = read_configuration(ROOT / "setup.cfg")["options"]["extras_require"]
    for extra in re.findall(r"[\w-]+", package.partition("[")[2]):
        assert extra in extras, package


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.stem)
def test_commands_of_a_page_exist_with_their_flags(page):
    for words in commands(page):
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_tests_that_a_page_names_exist(page):
    text = page.read_text()
    for file in re.findall(r"`((?:recipes|benchmarks|gradaug_hf|tests|docs|notebooks)/[\w/.]+)(?:::\w+)?`", text):
        assert (ROOT / file).exists(), file
    code = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for test in re.findall(r"\b(test_\w+)`", text):
        assert timm.is_model(test) or f"def {test}(" in code, test


def test_every_public_name_is_on_the_api_page():
    shown = re.findall(r"^::: gradaug_hf\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(shown) == sorted(name for name in gradaug_hf.__all__ if name != "__version__")
