"""What recipes/results says follows from the lines that are committed there."""

import json
from pathlib import Path

import pytest

from kd_core.study import read_study
from recipes.results import tables

STUDIES = sorted(file.parent for file in tables.HERE.glob("*/study.json"))


def test_the_tables_are_those_of_the_lines() -> None:
    page = (tables.HERE / "README.md").read_text()
    assert tables.render(page) == page
    assert {match[3] for match in tables.MARK.finditer(page) if match[2] == "arms"} == {
        folder.name for folder in STUDIES
    }


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_the_reports_are_those_of_the_lines(folder: Path, tmp_path: Path) -> None:
    tables.write_all_reports(folder, tmp_path)
    made = {file.relative_to(tmp_path): json.loads(file.read_text()) for file in tmp_path.glob("*/*/report.json")}
    kept = {file.relative_to(folder): json.loads(file.read_text()) for file in folder.glob("*/*/report.json")}
    assert made == kept
    assert len(made) >= len(read_study(folder / "study.json").arms) - 1
