import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a user of the trainer and of slicing alone does not need, and waits for if it is imported.
HEAVY = ("datasets", "pandas", "matplotlib", "torchvision.models", "sklearn", "pycocotools", "imagecorruptions")


def module_level_imports(file: Path) -> Iterator[str]:
    """Names of the modules that importing a file imports; those of type checkers and of functions are not."""

    def walk(nodes: list[ast.stmt]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, (ast.If, ast.Try)) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", [])):
                yield from walk(
                    [*node.body, *node.orelse, *(s for h in getattr(node, "handlers", ()) for s in h.body)]
                )

    return walk(ast.parse(file.read_text()).body)


def file_of(name: str) -> Path | None:
    """File of a module of this package, or of the module that a name is imported from."""
    for dotted in (name, name.rpartition(".")[0]):
        place = ROOT.joinpath(*dotted.split("."))
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if dotted and file.is_file():
                return file
    return None


def imported_with_the_package() -> dict[Path, list[str]]:
    """Files that `import gradaug_hf` executes, and what each imports."""
    found: dict[Path, list[str]] = {}
    waiting = [ROOT / "gradaug_hf" / "__init__.py"]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found[file] = list(module_level_imports(file))
        own = [file_of(name) for name in found[file] if name.partition(".")[0] == "gradaug_hf"]
        packages = [each.parent / "__init__.py" for each in own if each is not None]
        waiting += [each for each in (*own, *packages) if each is not None]
    return found


def test_training_and_slicing_import_nothing_that_they_do_not_need():
    found = imported_with_the_package()
    assert {"trainer.py", "slimmable.py", "objective.py", "configs.py", "pyramidnet.py"} <= {f.name for f in found}
    assert ROOT / "gradaug_hf" / "experiments" / "run.py" not in found
    for file, names in found.items():
        heavy = [name for name in names if any(f"{name}.".startswith(f"{each}.") for each in HEAVY)]
        assert not heavy, f"{file.relative_to(ROOT)} imports {', '.join(heavy)}"


@pytest.mark.slow
def test_the_package_is_imported_where_nothing_of_that_can_be():
    code = (  # the Trainer imports `datasets` itself where it is installed
        "import sys, torch, timm, transformers.trainer\n"
        f"sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
        "import gradaug_hf\n"
        "gradaug_hf.GradAugTrainer, gradaug_hf.make_slimmable"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
