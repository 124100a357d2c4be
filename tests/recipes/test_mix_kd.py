"""MIX-KD: the loss that is trained is the equation on mixed images, ranks mix the same ones, and bad flags are one line."""

from pathlib import Path

import pytest

from recipes.logits.mix_kd import main
from tests import warm
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, metrics

RECIPE = ROOT / "recipes" / "logits" / "mix_kd.py"
SMALL = "--data synthetic:10x32 --global-batch-size 16 --micro-batch-size 8 --log-every 1".split()


def train(folder: Path, *words: object, ranks: int = 1) -> list[dict[str, float]]:
    done = warm.ranks(ranks, [RECIPE, *SMALL, "--out", folder, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder)


def test_the_loss_is_the_equation_and_what_is_judged_has_a_deviation_of_one(tmp_path: Path) -> None:
    train(tmp_path / "teacher", "--steps", 2)
    taught = ["--teachers", tmp_path / "teacher", "--kd-ratio", 0.75, "--steps", 3]
    lines = train(tmp_path / "run", *taught, "--mix-share", 0.5)
    for line in lines:
        assert line["loss"] == pytest.approx(0.25 * line["label_loss"] + 0.75 * line["kd_loss"], rel=1e-5)
        assert line["kd_loss"] > 0
    plain = train(tmp_path / "plain", *taught, "--mix-share", 0)
    assert plain[0]["label_loss"] != lines[0]["label_loss"], "nothing was mixed"
    # Ten logits of deviation one: no probability above 0.73, so that no label costs less than 0.32.
    assert all(line["label_loss"] > 0.32 for line in lines) and lines[-1]["eval/loss"] > 0.32
    error, hits = lines[-1]["eval/calibration_error"], lines[-1]["eval/accuracy"]
    assert error <= max(hits, 0.7242 - hits) + 1e-4


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """The micro-batches are the same, and so is what is mixed in them."""
    train(tmp_path / "teacher", "--steps", 2)
    words = ["--teachers", tmp_path / "teacher", "--mix-share", 0.5, "--steps", 6]
    one, two = (train(tmp_path / f"of_{ranks}", *words, ranks=ranks) for ranks in (1, 2))
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "label_loss", "kd_loss", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3), (ours["step"], name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kd-ratio 1.5", "--kd-ratio must be in [0, 1], got 1.5"),
        ("--mixup 0", "--mixup must be a finite number above 0, got 0.0"),
        ("--mix-share -0.1", "--mix-share must be in [0, 1], got -0.1"),
        ("--teachers cache:nowhere", "--mix-share must be 0 for cached teachers, who saw other pixels, got 0.1"),
    ],
)
def test_bad_input_is_one_line(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in Attempt(main, [*SMALL], tmp_path, capsys)(*words.split())
