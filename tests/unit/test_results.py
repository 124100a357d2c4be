"""What recipes/results says follows from the lines that are committed there."""

import json
import re
from pathlib import Path

import pytest

from kd_core.study import design, read_study
from recipes.results import tables
from tests.conftest import ROOT

NUMBER = re.compile(r"(?<![\w.,])(?<!\w-)\d+(?:[.,]\d+)*(?:e-?\d+)?")
EVALUATED = re.compile(r"```.*?```|\{\{.*?\}\}|\{%.*?%\}|`[^`]*`|\]\(.*?\)", re.DOTALL)  # calls, code, links
# What the page says by hand: the paper's speed-ups, the level of the intervals, shares of a run, sizes of data sets, a
# rate of the tuning, dates and versions.
SAID = {"1.42", "1.96", "95", "30", "35", "48", "1.8", "6", "224", "1,000", "3,000", "5,000", "45,000", "4e-3"}
SAID |= {"21", "22", "28", "2026", "2.14", "2.15", "0.19.8", "3.11"}
GPU = sorted((tables.HERE / "gpu").glob("*.json"))


def test_the_page_is_that_of_the_lines() -> None:
    page = (tables.HERE / "README.md").read_text()
    assert tables.page() == page
    assert "nan" not in re.findall(r"\w+", page)
    for name in tables.studies():
        assert f'arms("{name}")' in (tables.HERE / tables.TEMPLATE).read_text()


def test_no_result_is_written_by_hand() -> None:
    """Numbers that the template does not compute are what runs were set to, or `SAID`."""
    files = [*tables.HERE.glob("*/study.json"), *GPU, tables.HERE / "prepare.sh"]
    settings = {number for file in files for number in NUMBER.findall(file.read_text())}
    told = NUMBER.findall(EVALUATED.sub("", (tables.HERE / tables.TEMPLATE).read_text()))
    assert not set(told) - settings - SAID


def test_the_readme_quotes_the_page_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(re.findall(r"(?:^> .*\n)+", readme, re.MULTILINE)) == 1
    assert tables.quoted(readme, tables.page()) == readme


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
