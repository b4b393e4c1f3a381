import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_of_two_processes_keeps_half_of_what_is_divided():
    line = "benchmarks/memory.py --model test_vit --processes 2 --num_subnets 1 --batch_size 1"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *line.split()], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in done.stdout.splitlines()[2:]]
    kept = {(wrapper, step): float(kept) for _, _, wrapper, step, kept, _ in cells}
    assert len(kept) == 5
    assert kept["DDP", "plain"] == kept["DDP", "GradAug"] > 3
    for (wrapper, _), found in kept.items():
        assert wrapper == "DDP" or found == pytest.approx(kept["DDP", "plain"] / 2, abs=1)
