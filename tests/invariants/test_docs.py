"""What the pages say is there: links lead somewhere, commands and their flags exist, the README's example runs."""

import dataclasses
import itertools
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PAGES = [ROOT / name for name in LISTED] or [ROOT / "README.md", *sorted(ROOT.glob("*/**/README.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)")
LAUNCHERS = {"python", "python3", "bash", "deepspeed", "sbatch"}
EVERYWHERE = {"--help", "--load", "--preset", "--dry-run", "--tyro-print-completion"}
LAUNCHERS_OWN = {"--num_gpus", "--hostfile", "--no_ssh", "--node_rank", "--master_addr", "--module"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^[ ]*```{language}\n(.*?)^[ ]*```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every command of this project in the page's shell blocks."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.commenters, lexer.whitespace_split = "#", True
            for split, piece in itertools.groupby(lexer, key=lambda word: set(word) <= set(";&|")):
                own = [word for word in piece if not re.fullmatch(r"\w+=.*", word)]
                if not split and own and (own[0] in LAUNCHERS or own[0].startswith("./launch/")):
                    found.append(own)
    return found


def target(words: list[str]) -> tuple[Path, list[str]] | None:
    """The file of the project that a command starts, and the words behind it; None where it starts none."""
    for place, word in enumerate(words):
        if word in ("-m", "--module") and words[place + 1].startswith("kd_core."):
            file = ROOT / words[place + 1].replace(".", "/")
            return (file if file.is_dir() else file.with_suffix(".py")), words[place + 2 :]
        if re.fullmatch(r"(\./)?(launch|recipes)/[\w./<>-]+\.(sh|py)", word):
            return ROOT / word, words[place + 1 :]
    return None


def flags_of(file: Path) -> set[str]:
    """The flags that the program understands."""
    source = "".join(path.read_text() for path in ([file] if file.is_file() else file.glob("*.py")))
    known = set(re.findall(r"--[a-z][\w-]+", source)) | EVERYWHERE
    recipe = (
        re.search(r"from recipes\.(\w+) import|kd_core\.(\w+)|recipes/(\w+)\.py", source)
        if file.suffix == ".sh"
        else None
    )
    named = [ROOT / "recipes" / f"{name}.py" for name in (recipe.groups() if recipe else ()) if name]
    for path in [file, *named] if file.suffix in (".py", ".sh") else []:
        names = runpy.run_path(str(path)) if path.suffix == ".py" and path.is_file() else {}
        for config in (names.get("Config"), names.get("Plan")):
            known |= {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config)} if config else set()
    if file.name == "cache":
        from kd_core.cache import images, mlm

        for kind in (images, mlm):
            known |= {"--" + field.name.replace("_", "-") for field in dataclasses.fields(kind.BuildFlags)}
    if file.name == "study.sh":
        known |= flags_of(ROOT / "kd_core" / "study.py")
    if file.name == "bench.sh":
        for path in (ROOT / "tests" / "benchmarks").glob("*.py"):
            known |= set(re.findall(r"--[a-z][\w-]+", path.read_text()))
        known |= flags_of(ROOT / "kd_core" / "kernels")
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith("http")]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_flags_exist(page: Path) -> None:
    wrong = []
    for words in commands(page):
        found = target(words)
        if found is None or "<" in str(found[0]):
            continue
        file, rest = found
        if not file.exists():
            wrong.append(f"{file} does not exist: {words}")
            continue
        if words[0].endswith("test.sh"):  # what follows are pytest's
            continue
        unknown = {word.split("=")[0] for word in rest if re.match(r"--[a-z]", word)} - flags_of(file) - LAUNCHERS_OWN
        if unknown:
            wrong.append(f"{sorted(unknown)}: {shlex.join(words)}")
    assert not wrong, "\n".join(wrong)


def test_the_example_of_the_readme_runs() -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names: dict[str, object] = {}
    exec(code, names)
    assert names["step"] == 99


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
