import ast
import json
import re
from pathlib import Path

import pytest

import gradaug_hf

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")])
# A package of its own, which needs pycocotools; its public names are those of its `__all__`.
DETECTION = "gradaug_hf.detection"


def python_code(page: Path) -> str:
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def imports(code: str) -> list[tuple[str, str]]:
    """Module and name of everything that some code imports from this package."""
    nodes = list(ast.walk(ast.parse(code)))
    whole = [(alias.name, "") for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names = [(n.module or "", alias.name) for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names]
    return [(module, name) for module, name in whole + names if module.partition(".")[0] == "gradaug_hf"]


def test_imports_are_found_in_pages_and_notebooks():
    assert imports("import gradaug_hf.slimming\nfrom gradaug_hf import GradAug as G\nimport torch") == [
        ("gradaug_hf.slimming", ""),
        ("gradaug_hf", "GradAug"),
    ]
    assert imports(python_code(ROOT / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_imports_is_a_public_name(page):
    for module, name in imports(python_code(page)):
        if module == DETECTION:
            tree = ast.parse((ROOT / "gradaug_hf" / "detection" / "__init__.py").read_text())
            (public,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
            assert name in ast.literal_eval(public), (module, name)
        else:
            assert module == "gradaug_hf", (module, name)
            assert not name or name in gradaug_hf.__all__, (module, name)


def test_every_public_name_is_there():
    assert gradaug_hf.__all__ == sorted(set(gradaug_hf.__all__))
    for name in gradaug_hf.__all__:
        assert getattr(gradaug_hf, name) is not None
        assert name in dir(gradaug_hf)
    with pytest.raises(AttributeError, match="has no attribute 'GradAugment'"):
        gradaug_hf.GradAugment  # noqa: B018
