"""What holds for every recipe, by its header: the smoke command runs; killed with -9 on two ranks it resumes exactly."""

import ast
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, cpu_environment, free_port

# GLUE's starts from a pretrained run: tests/recipes/test_glue.py.
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("[a-z]*.py")
    if "results" not in path.parts and path != ROOT / "recipes" / "glue.py"
)
TIMES = {"train_s", "teacher_s", "data_s"}
# What makes a smoke run long enough to be killed inside, of a recipe without a line `Kill:`.
KILL = "--steps 8 --save-every 3 --eval-every 4 --log-every 1"
Smoke = Callable[[Path], list[str]]


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


def begin(words: list[str], ranks: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """The ranks of a run, without a launcher between them and the test."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(ranks):
        env = cpu_environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        with (folder / f"{rank}.log").open("a") as log:
            started.append(subprocess.Popen(words, cwd=folder, env=env, stderr=log))
    return started


def run(words: list[str], ranks: int, folder: Path) -> None:
    codes = [process.wait(240) for process in begin(words, ranks, folder)]
    assert codes == [0] * ranks, (folder / "0.log").read_text()[-3000:]


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    complete = file.read_text().split("\n")[:-1] if file.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in complete]


def exported(folder: Path) -> dict[str, bytes]:
    """What a run has made besides its records: hf/, or what its field's own library loads."""
    records = ("run.json", "metrics.jsonl", "tensorboard", "checkpoints")
    files = (path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] not in records)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """A recipe's smoke command, its teacher trained if it names one; a teacher of the same command is trained once."""
    teachers: dict[str, str] = {}

    def words(recipe: Path) -> list[str]:
        told = header(recipe)
        own = command(told["Smoke"])
        assert Path(own[1]) == recipe, f"{recipe}: its smoke command runs {own[1]}"
        if line := told.get("Teacher"):
            if not line.startswith("python "):  # flags that are added to its own
                without = told["Smoke"].replace("--teachers {teacher}", "")
                line = f"{without} {line}"
            if line not in teachers:
                folder = tmp_path_factory.mktemp("teacher")
                run([*command(line), "--out", "run"], 1, folder)
                teachers[line] = str(folder / "run")
            own = [word.replace("{teacher}", teachers[line]) for word in own]
        return own

    return words


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_smoke_command_of_the_header_runs(recipe: Path, smoke: Smoke, tmp_path: Path) -> None:
    run(smoke(recipe), 1, tmp_path)
    (folder,) = (tmp_path / "runs" / recipe.stem).iterdir()
    result = json.loads((folder / "run.json").read_text())["result"]
    assert result["stopped"] == "finished"
    assert not [name for name, value in result.items() if value is None], "a value that is not finite"
    assert exported(folder)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_kill_9_on_two_ranks_then_resume_gives_the_same_lines_and_bytes(
    recipe: Path, smoke: Smoke, tmp_path: Path
) -> None:
    words = [*smoke(recipe), *shlex.split(header(recipe).get("Kill", KILL))]
    run([*words, "--out", "whole"], 2, tmp_path)
    killed = begin([*words, "--out", "killed"], 2, tmp_path)
    deadline = time.monotonic() + 240
    while len(lines(tmp_path / "killed")) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "result" not in json.loads((tmp_path / "killed" / "run.json").read_text()), "it ended before it was killed"
    run([*words, "--out", "killed", "--resume"], 2, tmp_path)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert exported(tmp_path / "killed") == exported(tmp_path / "whole")
