"""What stands in the head of a recipe: words, and the commands behind them."""

import ast
import re
import shlex
import sys
from pathlib import Path

from tests.conftest import ROOT


def header(recipe: Path) -> dict[str, str]:
    """The lines `Word:  text` of a recipe's docstring, each with its continuation."""
    text = ast.get_docstring(ast.parse(recipe.read_text())) or ""
    found = re.findall(r"^([A-Z]\w+):\s+(.*(?:\n\s+.*)*)", text, re.MULTILINE)
    return {name: " ".join(value.split()) for name, value in found}


def command(line: str) -> list[str]:
    """A header's `python recipes/x.py ...`, by this Python and from anywhere."""
    python, script, *words = shlex.split(line)
    assert python == "python" and (ROOT / script).is_file(), f"not a command of a recipe: {line}"
    return [sys.executable, str(ROOT / script), *words]


def words_of(line: str) -> list[str]:
    """The flags of a header's `deepspeed recipes/x.py ...` or `python recipes/x.py ...`."""
    launcher, script, *words = shlex.split(line)
    assert launcher in ("deepspeed", "python") and (ROOT / script).is_file(), f"not a command of a recipe: {line}"
    return words
