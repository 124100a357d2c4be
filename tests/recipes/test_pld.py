"""Plackett-Luce distillation: the loss that is trained is the ranking's, and bad flags are one line."""

from pathlib import Path

import pytest

from recipes.logits.pld import main
from tests import warm
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, metrics

RECIPE = ROOT / "recipes" / "logits" / "pld.py"
SMALL = "--data synthetic:10x32 --global-batch-size 16 --micro-batch-size 8 --log-every 1".split()


def test_a_cold_teacher_leaves_the_labels_and_a_warm_one_the_whole_ranking(tmp_path: Path) -> None:
    """Ten classes ranked with equal weights: on logits of about zero a tenth of log 10!, where the labels alone give log 10."""

    def train(name: str, *words: object) -> list[float]:
        done = warm.ranks(1, [RECIPE, *SMALL, "--steps", 2, "--out", tmp_path / name, *words])
        assert done.returncode == 0, done.stderr[-3000:]
        return [line["loss"] - line["label_loss"] for line in metrics(tmp_path / name)]

    assert train("teacher") == [0.0, 0.0]
    taught = train("taught", "--teachers", tmp_path / "teacher", "--teacher-temperature", 1e6)
    assert taught[0] == pytest.approx(1.5104 - 2.3026, abs=0.15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--teacher-temperature 0", "--teacher-temperature must be a finite number above 0, got 0.0"),
        ("--teacher-temperature nan", "--teacher-temperature must be a finite number above 0, got nan"),
    ],
)
def test_bad_input_is_one_line(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in Attempt(main, [*SMALL], tmp_path, capsys)(*words.split())
