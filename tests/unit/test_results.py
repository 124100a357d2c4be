"""What recipes/results says follows from the lines that are committed there."""

import json
from pathlib import Path

import pytest

from kd_core.study import read_study, write_reports
from recipes.results import tables

STUDIES = sorted(file.parent for file in tables.HERE.glob("*/study.json"))


def test_the_tables_are_those_of_the_lines() -> None:
    page = (tables.HERE / "README.md").read_text()
    assert tables.render(page) == page
    assert {match[3] for match in tables.MARK.finditer(page) if match[2] == "arms"} == {
        folder.name for folder in STUDIES
    }


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_the_reports_are_those_of_the_lines(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").symlink_to(tables.HERE / "prepared")  # where the teachers' own costs stand
    (tmp_path / "recipes").symlink_to(tables.HERE.parent)
    monkeypatch.chdir(tmp_path)
    study = read_study(folder / "study.json")
    write_reports(study, Path("recipes/results") / folder.name, tmp_path / "report")
    if (folder / tables.LONGEST).exists():
        tables.write_longest(study, Path("recipes/results") / folder.name, tmp_path / tables.LONGEST)
    made = {file.relative_to(tmp_path): json.loads(file.read_text()) for file in tmp_path.glob("*/*/report.json")}
    kept = {file.relative_to(folder): json.loads(file.read_text()) for file in folder.glob("*/*/report.json")}
    assert made == kept
    assert len(made) >= len(study.arms) - 1
