"""New folders that appear whole, or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(output: Path) -> None:
    """Raise a ValueError where a folder to be written is there and not empty, or is a file."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists already; a new or an empty folder is accepted")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder to write in, which becomes `output` at the end; nothing is left of it after an error.

    Raises:
        ValueError: `output` is neither new nor empty, or cannot be written.
    """
    check_new(output)
    parent = output.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as scratch:
            folder = Path(scratch, "folder")  # with the usual permissions, which a temporary folder does not have
            folder.mkdir()
            yield folder
            folder.replace(output.resolve())
    except OSError as error:
        raise ValueError(f"output {output} cannot be written: {error}") from error
