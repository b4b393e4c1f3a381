from tests.helpers.pages import README, ROOT, blocks


def test_first_block_is_the_two_commands():
    _, first = README.read_text().split("```", 2)[:2]
    assert first.splitlines() == [
        "bash",
        'python -m venv .venv && .venv/bin/pip install -e ".[quickstart]" && '
        ".venv/bin/accelerate launch recipes/quickstart.py",
        'python -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest',
    ]


def test_continuous_integration_runs_the_test_command():
    assert blocks(README, "bash")[0].splitlines()[1] in (ROOT / ".ci" / "run").read_text()


def test_the_readme_has_at_most_eight_kilobytes():
    assert len(README.read_bytes()) <= 8192
