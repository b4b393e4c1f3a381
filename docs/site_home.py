"""Make the README the first page of the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

README = Path(__file__).parents[1] / "README.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as `index.md`, with its links to pages made relative to the site."""
    files.append(File.generated(config, "index.md", content=README.read_text().replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Return a page with files outside the site named instead of linked."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)?notebooks/[^)]*\)", r"`\1`", markdown)
