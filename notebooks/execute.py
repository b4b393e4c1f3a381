"""Run the notebooks in a kernel and keep their outputs: `python notebooks/execute.py`.

Progress bars and warnings, which differ from machine to machine, are left out.
"""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(notebook: nbformat.NotebookNode, folder: str | Path) -> None:
    """Run a notebook in a folder, and put the outputs of this run into it.

    Args:
        notebook: changed in place; its metadata stays as it was.
        folder: where its code writes files.

    Raises:
        CellExecutionError: a cell raised an error.
    """
    metadata = notebook.metadata.copy()
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False, resources=resources).execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def main() -> None:
    for file in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder)
        nbformat.write(notebook, file)
        print(f"ran {file.name}")


if __name__ == "__main__":
    main()
