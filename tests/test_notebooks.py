from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("fine_tuning.ipynb", "looking_inside.ipynb")
SHORTER = {
    "EPOCHS = 60": "EPOCHS = 1",
    "num_train_epochs=4": "num_train_epochs=1",
    "num_train_epochs=3": "num_train_epochs=1",
    "take(400)": "take(400).select(range(0, 400, 4))",
    "(0, 100, 200, 300)": "(0,)",
}


def read(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_code_of_a_notebook_runs_with_a_shorter_training(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    names: dict = {"__name__": "notebook"}
    for number, cell in enumerate(code_cells(name)):
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
        exec(compile(cell.source, f"{name}, code cell {number}", "exec"), names)
    assert shown  # the pictures


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_of_a_notebook_are_cleared(name: str):
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(name))


def test_every_notebook_is_run():
    assert sorted(file.name for file in (ROOT / "notebooks").glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_in_a_kernel_as_it_is(name: str, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(name)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
