import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_first_block_is_the_two_commands():
    _, first = README.split("```", 2)[:2]
    assert first.splitlines() == [
        "bash",
        'python -m venv .venv && .venv/bin/pip install -e ".[quickstart]" && '
        ".venv/bin/accelerate launch recipes/quickstart.py",
        'python -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest',
    ]


def test_continuous_integration_runs_the_test_command():
    assert blocks("bash")[0].splitlines()[1] in (ROOT / ".ci" / "run").read_text()


def test_python_blocks_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "readme"}
    assert len(blocks("python")) >= 3
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)


def test_files_that_are_named_exist():
    for file in re.findall(r"`((?:recipes|benchmarks|gradaug_hf|tests|docs)/[\w/.]+)`", README):
        assert (ROOT / file).exists(), file
