import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import nbformat
import pytest

from notebooks.execute import execute

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("fine_tuning.ipynb", "looking_inside.ipynb")
SHORTER = {
    "EPOCHS = 60": "EPOCHS = 1",
    'old["train"],\n    old["eval"]': 'old["train"].take(64),\n    old["eval"].take(64)',
    '        new["eval"],': '        new["eval"].take(64),',
    "num_train_epochs=4": "num_train_epochs=1",
    "num_train_epochs=6": "num_train_epochs=1",
    "take(400)": "take(400).select(range(0, 400, 4))",
    "(0, 100, 200, 300)": "(0,)",
}
# Of cells whose text is the same on every machine.
SAME = "same-everywhere"


def read(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> Iterator[nbformat.NotebookNode]:
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def text_of(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def number_of_pictures(cell: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_gives_the_outputs_that_it_has(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    names: dict = {"__name__": "notebook"}
    for number, cell in enumerate(code_cells(read(name))):
        source, printed = cell.source, io.StringIO()
        for long, short in SHORTER.items():
            source = source.replace(long, short)
        shown.clear()
        with redirect_stdout(printed):
            exec(compile(source, f"{name}, code cell {number}", "exec"), names)
        assert len(shown) == number_of_pictures(cell)
        assert len(printed.getvalue().splitlines()) == len(text_of(cell).splitlines())
        if SAME in cell.metadata.get("tags", []):
            assert printed.getvalue() == text_of(cell)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_with_small_outputs_of_one_run(name: str):
    cells = list(code_cells(read(name)))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(map(number_of_pictures, cells)) >= 2
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr" for c in cells for output in c.outputs
    )
    assert (ROOT / "notebooks" / name).stat().st_size < 250_000


def test_every_notebook_is_run():
    assert sorted(file.name for file in (ROOT / "notebooks").glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_in_a_kernel_as_it_is(name: str, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(name)
    execute(notebook, tmp_path)
    assert all(cell.outputs for cell in code_cells(notebook) if "print" in cell.source or "show(" in cell.source)
