"""What keeps the house in order: import directions, the root and thin recipes."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT

CORE = ROOT / "kd_core"
RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.py") if path.name != "__init__.py" and "results" not in path.parts
)
STANDARD = set(sys.stdlib_module_names)
STANDARD_OF_LATER = {"annotationlib", "compression"}  # Python 3.14's
# From the ground up; rooms of one floor know nothing of each other. A file directly in kd_core is a room of its own, a door.
FLOORS = (
    {"kernels", "system", "cli", "launch"},
    {"losses", "networks", "runs"},
    {"training"},
    {"teachers", "text", "images"},
    {"cache", "glue", "time_to_quality", "presets"},
    {"compare", "classification"},
    {"study", "plan"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What a recipe leaves to the core: a line that does it by hand would divide, step, talk or save differently from the rest.
LEFT_TO_THE_CORE = {
    "all_reduce",
    "all_gather",
    "barrier",
    "broadcast",
    "save_checkpoint",
    "load_checkpoint",
    "zero_grad",
}
MOST_LINES = {"glue": 230}  # of a recipe that is not a method; the other models have 200, methods 150
MAIN = 50


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


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """Modules of the project that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & known
            if names - known and node.module in known:
                yield node.module or ""


def arrows() -> dict[str, set[str]]:
    files = {module(path): path for path in CORE.rglob("*.py") if path.name != "__init__.py"}
    return {name: set(imported(path, set(files))) for name, path in files.items()}


def test_no_imports_run_in_a_circle() -> None:
    try:
        list(graphlib.TopologicalSorter(arrows()).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_imports_go_down_the_floors() -> None:
    wrong = []
    for name, others in arrows().items():
        room = name.split(".")[1]
        for other in others:
            below = other.split(".")[1]
            if below != room and FLOOR_OF[below] >= FLOOR_OF[room]:
                wrong.append(f"{name} (floor {FLOOR_OF[room]}) imports {other} (floor {FLOOR_OF[below]})")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_on_a_floor() -> None:
    rooms = {path.stem for path in CORE.glob("*.py")} | {path.parent.name for path in CORE.glob("*/__init__.py")}
    assert rooms - {"__init__"} == set(FLOOR_OF)


def test_no_recipe_hides_a_module_that_python_or_a_dependency_has() -> None:
    """`python recipes/x.py` puts that folder first on the path."""
    taken = STANDARD | STANDARD_OF_LATER | set(packages_distributions()) - {"recipes"}
    for path in (ROOT / "recipes").rglob("*"):
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))):
            assert path.stem == "__init__" or path.stem not in taken, f"{path} hides the module {path.stem}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_thin_and_leave_the_dangerous_things_to_the_core(recipe: Path) -> None:
    source, wrong = recipe.read_text(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "main" and node.end_lineno - node.lineno >= MAIN:
            wrong.append(f"main has {node.end_lineno - node.lineno + 1} lines, more than {MAIN}")
        if not isinstance(node, ast.Attribute) or recipe.stem == "glue":  # whose jobs of seconds have no engine
            continue
        by_hand = node.attr in ("backward", "step") and isinstance(node.value, ast.Name) and node.value.id != "step"
        if node.attr in LEFT_TO_THE_CORE or by_hand:
            wrong.append(f"line {node.lineno}: {node.attr}; Step.backward and Step.update do it")
    most = MOST_LINES.get(recipe.stem, 200) if recipe.parent.name == "recipes" else 150
    if source.count("\n") > most:
        wrong.append(f"{source.count(chr(10))} lines, more than {most}")
    assert not wrong, f"{recipe}: {wrong}"


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
