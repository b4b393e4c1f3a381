import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_step_is_a_process_with_each_environment():
    flags = ["--network", "test_resnet:64:2", "--steps", "2", "--environments", "", "A=1 B=2"]
    command = [sys.executable, "benchmarks/resident_memory.py", *flags]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["plain", ""], ["GradAug", ""], ["plain", "A=1 B=2"], ["GradAug", "A=1 B=2"]]
    assert rows[0][3] == "1.00"
    assert all(float(peak.replace(",", "")) > 100 and float(seconds) > 0 for _, _, peak, _, seconds in rows)


def test_an_environment_that_is_no_variable_is_one_line(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["resident_memory.py", "--environments", "A"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "benchmarks/resident_memory.py"), run_name="__main__")
    assert capsys.readouterr().err.endswith("'A' must be variables such as A=1 with a space between them\n")
