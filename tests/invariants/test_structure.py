"""What keeps the house in order: import directions, the root, and the smoke command of each recipe's header."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, cpu_environment

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if path.name != "__init__.py")
STANDARD = set(sys.stdlib_module_names)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module or ""


def test_recipes_import_no_recipe_and_the_core_imports_no_recipe() -> None:
    assert RECIPES
    for path in [*RECIPES, *(ROOT / "kd_core").rglob("*.py")]:
        assert not [name for name in imports(path) if name.split(".")[0] == "recipes"], path


def test_kernels_can_be_taken_alone() -> None:
    folder = ROOT / "kd_core" / "kernels"
    kernels = [path for path in folder.glob("*.py") if not path.name.startswith("bench")]
    assert kernels
    siblings = {"kd_core.kernels", *(f"kd_core.kernels.{path.stem}" for path in kernels)}
    for path in kernels:
        foreign = {name for name in imports(path) if name.split(".")[0] not in STANDARD | {"torch", "triton"}}
        assert foreign <= siblings, f"{path} imports {foreign - siblings}"


def test_packages_re_export_nothing() -> None:
    for path in [ROOT / "recipes" / "__init__.py", *(ROOT / "kd_core").rglob("__init__.py")]:
        assert [type(node) for node in ast.parse(path.read_text()).body] == [ast.Expr], (
            f"{path} holds more than a docstring"
        )


def test_only_known_names_stand_at_the_root() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {name.split("/")[0] for name in listed.stdout.splitlines()}
    allowed = {
        "recipes",
        "kd_core",
        "ds_configs",
        "launch",
        "tests",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    }
    assert {name for name in names if not name.startswith(".")} <= allowed


def run_smoke_command(recipe: Path, folder: Path) -> None:
    header = ast.get_docstring(ast.parse(recipe.read_text())) or ""
    match = re.search(r"^Smoke:\s+python (.+)$", header, re.MULTILINE)
    assert match, f"{recipe} has no line 'Smoke: python ...'"
    words = shlex.split(match.group(1))
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env=cpu_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


# GLUE's starts from a pretrained run: tests/recipes/test_glue.py.
@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem != "glue"], ids=lambda path: path.stem)
def test_the_smoke_command_of_the_header_runs(recipe: Path, tmp_path: Path) -> None:
    run_smoke_command(recipe, tmp_path)
    assert (tmp_path / "runs" / recipe.stem / "1" / "hf" / "model.safetensors").exists()
