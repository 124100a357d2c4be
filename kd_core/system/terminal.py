"""What is said on the terminal, and tables there and in files."""

import sys
from collections.abc import Sequence


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, the first of `rows` its head."""
    head, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *others]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for the terminal, its columns to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
