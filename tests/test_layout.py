"""The rooms of the package: imports run downwards only, and no files import each other in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gradaug_hf"
# From the ground up. A file imports from its own room and from those below it.
ROOMS = ["version", "utils", "models", "slimming", "objective", "data", "hub", "reports", "trainer", "experiments"]
ROOMS += ["detection", "cli", ""]


def imported_names(source: str) -> set[str]:
    """Return the dotted names that a file imports, also within functions and `TYPE_CHECKING` blocks."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(file: Path) -> str:
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(file: Path) -> set[str]:
    """Return the modules of the package that a file imports: of `a.b.c`, the longest part that is one."""
    found = set()
    for name in imported_names(file.read_text()):
        parts = name.split(".")
        longer = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        found |= {next((part for part in longer if part in MODULES), None)} - {None}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards_only(module):
    allowed = ROOMS[: ROOMS.index(room_of(module)) + 1]
    upwards = {name for name in imported_modules(MODULES[module]) if room_of(name) not in allowed}
    assert not upwards


def test_no_files_import_each_other_in_a_circle():
    graph = {module: imported_modules(file) - {module} for module, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_at_most_four_modules_lie_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 4


@pytest.mark.parametrize(
    "source",
    [
        "import gradaug_hf.a",
        "from gradaug_hf import a",
        "def f():\n import gradaug_hf.a",
        "if TYPE_CHECKING:\n from gradaug_hf import a",
    ],
)
def test_imports_are_found_wherever_they_stand(source):
    assert imported_names(source) == {"gradaug_hf.a"}
