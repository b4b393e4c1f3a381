import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("network", ["resnet50:224", "resnet50:224:0", "resnet50:big:8"])
def test_a_network_without_side_or_batch_is_one_line(network: str, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["step.py", "--networks", network])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(FOLDER / "step.py"), run_name="__main__")
    assert capsys.readouterr().err.endswith(f"'{network}' must be name:side:batch, for example resnet50:224:8\n")
