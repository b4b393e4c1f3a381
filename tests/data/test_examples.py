import doctest
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers.pictures import picture

MODULES = {name: import_module(f"gradaug_hf.data.{name}") for name in (
    "collator", "decoding", "digits", "loading", "seeded", "transforms",
)}  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path, monkeypatch) -> None:
    """Make a folder `photos` in the working directory."""
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(2):
                picture(100 * number + index).save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings_give_what_they_say(module: str, photos):
    names = {name: value for other in MODULES.values() for name, value in vars(other).items() if name[0] != "_"}
    done = doctest.testmod(MODULES[module], extraglobs=names)
    assert (done.failed, done.attempted > 0) == (0, True)
