"""What recipes/results says follows from the lines that are committed there."""

import json
import re
from pathlib import Path

import pytest

from kd_core.study import design, read_study
from recipes.results import tables
from tests.conftest import ROOT

GPU = sorted((tables.HERE / "gpu").glob("*.json"))


def test_the_page_is_that_of_the_lines() -> None:
    page = (tables.HERE / "README.md").read_text()
    assert tables.page() == page
    for name in tables.studies():
        assert f'arms("{name}")' in (tables.HERE / tables.TEMPLATE).read_text()


def test_the_readme_quotes_the_page_as_it_is() -> None:
    readme, page = ((folder / "README.md").read_text() for folder in (ROOT, tables.HERE))
    quotes = re.findall(r"(?:^> .*\n)+", readme, re.MULTILINE)
    assert len(quotes) >= 1
    for quote in quotes:
        assert quote.replace("> ", "") in page


@pytest.mark.parametrize("name", tables.studies())
def test_the_reports_are_those_of_the_lines(name: str, tmp_path: Path) -> None:
    folder = tables.HERE / name
    tables.write_all_reports(folder, tmp_path)
    made = {file.relative_to(tmp_path): json.loads(file.read_text()) for file in tmp_path.glob("*/*/report.json")}
    kept = {file.relative_to(folder): json.loads(file.read_text()) for file in folder.glob("*/*/report.json")}
    assert made == kept
    assert len(made) >= len(read_study(folder / "study.json").arms) - 1


@pytest.mark.parametrize("file", GPU, ids=lambda file: file.stem)
def test_the_studies_for_a_gpu_can_be_designed(file: Path, tmp_path: Path) -> None:
    study = read_study(file)
    assert len(design(study, tmp_path)) == 1 + len(study.arms) * len(study.lengths) * len(study.seeds)
