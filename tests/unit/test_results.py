"""What recipes/results says follows from the lines that are committed there."""

import lzma
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_core.runs import jobs, lean
from kd_core.study import design, made_with, read_study, restore
from recipes.results import tables
from tests.conftest import ROOT

NUMBER = re.compile(r"(?<![\w.,])(?<!\w-)\d+(?:[.,]\d+)*(?:e-?\d+)?")
EVALUATED = re.compile(r"```.*?```|\{\{.*?\}\}|\{%.*?%\}|`[^`]*`|\]\(.*?\)", re.DOTALL)  # calls, code, links
# What the page says by hand: the level of the intervals, shares of a run, sizes of data sets, a
# rate of the tuning, dates and versions, minutes that runs to come are thought to take.
SAID = {"95", "30", "35", "48", "1.8", "6", "224", "1,000", "3,000", "5,000", "45,000", "4e-3"}
SAID |= {"21", "22", "28", "2026", "2.14", "2.15", "0.19.8", "3.11", "10", "15", "40", "175"}
STUDIES = [tables.HERE / name for name in tables.studies()] + sorted(
    file.parent for file in (tables.HERE / "methods").rglob("runs.json")
)
LATER = re.compile(r"for name in (\(.*?\)) %")
GPU = sorted((tables.HERE / "gpu").glob("*.json"))


def test_the_page_is_that_of_the_lines() -> None:
    page, template = (tables.HERE / "README.md").read_text(), (tables.HERE / tables.TEMPLATE).read_text()
    assert tables.page() == page
    assert "nan" not in re.findall(r"\w+", page)
    for name in tables.studies():
        assert f'arms("{name}")' in template or f'"{name}"' in LATER.findall(template)[0]


def test_no_result_is_written_by_hand() -> None:
    """Numbers that the template does not compute are what runs were set to, or `SAID`."""
    files = [*tables.HERE.rglob("study.json"), *GPU, tables.HERE / "prepare.sh"]
    settings = {number for file in files for number in NUMBER.findall(file.read_text())}
    told = NUMBER.findall(EVALUATED.sub("", (tables.HERE / tables.TEMPLATE).read_text()))
    assert not set(told) - settings - SAID


def test_the_table_of_the_readme_is_that_of_the_lines() -> None:
    readme = (ROOT / "README.md").read_text()
    assert tables.with_table(readme) == readme
    assert readme.count(tables.found()) == 1


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_a_study_goes_on_in_a_clone_and_runs_nothing_that_stands_in_its_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("runs/study", folder.name)
    study, there = read_study(folder / "study.json"), lean.read(folder)
    runs = [run for run in design(study, out) if "/" in run.name and run.name in there]
    assert {run.name.split("/")[0] for run in runs} >= set(study.arms)
    restore(runs, there, out, study.ranks)
    for run in runs:
        jobs.check_unchanged(run, run.fields, recipe=Path(run.recipe).stem, ranks=study.ranks, defaults=run.defaults)
        assert jobs.finished(run)
    jobs.check_inputs(made_with(runs, there, out))
    collected = {run.name: lean.of_run(run.folder, out) for run in runs}
    lean.write(tmp_path, there | collected)
    for file in ("runs.json", "runs.csv"):
        assert (tmp_path / file).read_text() == (folder / file).read_text()


def test_what_is_committed_is_small() -> None:
    """Lines are text for people and diffs; a study of a method has no pictures."""
    files = [file for file in tables.HERE.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) < 1.2e6
    assert sum(file.suffix in (".png", ".svg") for file in files) <= 6
    for folder in tables.HERE.glob("methods/*"):
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 30_000, folder


@pytest.mark.parametrize("file", GPU, ids=lambda file: file.stem)
def test_the_studies_for_a_gpu_can_be_designed(file: Path, tmp_path: Path) -> None:
    study = read_study(file)
    assert len(design(study, tmp_path)) == 1 + len(study.arms) * len(study.lengths) * len(study.seeds)


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """prepare.sh with names, in a folder of its own, where python only notes what it was asked for."""
    (tmp_path / "recipes/results").mkdir(parents=True)
    shutil.copy(tables.HERE / "prepare.sh", tmp_path / "recipes/results")
    (tmp_path / "wiki").mkdir()
    for name in ("train", "validation"):
        (tmp_path / f"wiki/{name}.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n' * 8))
    (tmp_path / "python").write_text('#!/bin/sh\nfor last; do :; done; echo "$last" >>asked\n')
    (tmp_path / "python").chmod(0o755)

    def run(*names: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WIKI": str(tmp_path / "wiki")}
        command = ["bash", "recipes/results/prepare.sh", *names]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        asked = tmp_path / "asked"
        return done, asked.read_text().split() if asked.exists() else []

    return run


def test_teachers_are_made_by_name_or_all_of_them(prepare: Callable[..., Any], tmp_path: Path) -> None:
    done, asked = prepare("teachers/long", "caches/good", "teachers/equal_12")
    assert done.returncode == 0 and asked == ["runs/teachers/long", "runs/teachers/equal_12", "runs/caches/good"], done
    assert len((tmp_path / "runs/data/wikipedia_report/validation.jsonl").read_text().splitlines()) == 2
    done, asked = prepare("teachers/god")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: teachers/god is not known; name some of data teachers/good "
    )
    done, asked = prepare()
    assert done.returncode != 0 and "CIFAR" in done.stderr and len(asked) == 3


def test_every_teacher_and_cache_of_a_study_can_be_named() -> None:
    text = (tables.HERE / "prepare.sh").read_text()
    (known,) = re.findall(r"^known=\((.*?)\)$", text, re.DOTALL | re.MULTILINE)
    command = f"known=({known}); echo ${{known[@]}}"
    names = subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout.split()
    used = {
        name
        for file in tables.HERE.glob("*/study.json")
        for name in re.findall(r"runs/((?:teachers|caches)/\w+)", file.read_text())
    }
    assert used and used <= set(names)


def test_what_was_predicted_is_told_beside_what_the_lines_say(monkeypatch: pytest.MonkeyPatch) -> None:
    told = dict(
        what=("quality large 3200", "3.621"), alone=("quality baseline 900", "not run yet"),
        steps=("steps_to large 3200 5.5", "400, 400, 400"), never=("steps_to baseline 3200 4.5", "not reached, not reached, not reached"),
        saved=("saved large 3200 5.5", "1900, in 3 seeds"),
    )  # fmt: skip
    assert {name: (how, tables.found_out("bert_long", how)) for name, (how, _) in told.items()} == told
    for name in LATER.findall((tables.HERE / tables.TEMPLATE).read_text())[0][1:-1].replace('"', "").split(", "):
        study = read_study(tables.HERE / name / "study.json")
        assert study.predicted
        for _, how, _ in study.predicted:
            function, arm, steps, *_ = how.split()
            assert function in ("quality", "steps_to", "saved", "part") and int(steps) in study.arm(arm).lengths
        assert len(design(study, Path("runs/study", name))) >= len(study.arms)
