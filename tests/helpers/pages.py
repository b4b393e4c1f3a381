"""The README and the pages of docs/: their code blocks and commands."""

import re
import shlex
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language, in their order; those of a tab are indented on the page."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [dedent(block) for _, block in found]


def commands(page: Path) -> list[list[str]]:
    """Return the words of each shell command, of the blocks and of a line of text."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:(?:accelerate launch|python) [^`]*\.py|gradaug |pip )[^`]*)`", page.read_text())
    words = [shlex.split(command) for line in lines for command in line.split("&&")]
    return [[word for word in command if not re.fullmatch(r"[A-Z_]+=\S*", word)] for command in words if command]
