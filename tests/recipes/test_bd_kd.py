"""Balanced divergence: both networks are trained by their equations, and bad flags are one line."""

from pathlib import Path

import pytest

from recipes.logits.bd_kd import main
from tests import warm
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, metrics

RECIPE = ROOT / "recipes" / "logits" / "bd_kd.py"
SMALL = "--data synthetic:10x32 --global-batch-size 16 --micro-batch-size 8 --log-every 1 --teacher resnet8".split()


def test_both_networks_are_trained_by_their_equations(tmp_path: Path) -> None:
    for name, words in {
        "run": ["--kd-weight", "0.5"],
        "apart": ["--kd-weight", "0"],
        "reverse": ["--divergence", "reverse"],
    }.items():
        done = warm.ranks(1, [RECIPE, *SMALL, "--steps", 3, "--out", tmp_path / name, *words])
        assert done.returncode == 0, done.stderr[-3000:]
    for line in metrics(tmp_path / "run"):
        assert line["loss"] == pytest.approx(line["label_loss"] + 0.5 * line["kd_loss"], rel=1e-5)
        assert line["teacher_loss"] == pytest.approx(
            line["teacher_label_loss"] + 0.5 * line["teacher_kd_loss"], rel=1e-5
        )
    for line in metrics(tmp_path / "apart"):  # two networks of one kind and seed, on the same images
        assert line["kd_loss"] == 0 and line["teacher_label_loss"] == line["label_loss"] == line["loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--delta 0.5", "--delta must be a finite number, at least 1, got 0.5"),
        ("--temperature 0", "--temperature must be a finite number above 0, got 0.0"),
        ("--kd-weight -1", "--kd-weight must be a finite number, at least 0, got -1.0"),
        ("--teachers resnet20", "--teachers must be empty: the teacher of this method is --teacher"),
        ("--teacher resnet9", "--teacher resnet9 is no folder and no known size"),
    ],
)
def test_bad_input_is_one_line(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in Attempt(main, [*SMALL[:-2]], tmp_path, capsys)(*words.split())
