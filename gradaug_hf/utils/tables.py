"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return a Markdown table, the first columns left-aligned as text and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells[:text_columns], widths, strict=False)]
        padded += [cell.rjust(width) for cell, width in zip(cells[text_columns:], widths[text_columns:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rules = ["-" * (width + 2) for width in widths[:text_columns]]
    rules += ["-" * (width + 1) + ":" for width in widths[text_columns:]]
    return "\n".join([line(header), "|" + "|".join(rules) + "|", *map(line, rows)])
