"""TGeo-KD: each image's loss is mixed by its ratio, the ratio is learned, groups of classes are judged, and bad flags are one line."""

from pathlib import Path
from typing import Any

import pytest

from recipes.logits.tgeo_kd import main
from tests import warm
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, guessing, metrics

RECIPE = ROOT / "recipes" / "logits" / "tgeo_kd.py"
SMALL = "--data synthetic:10x32 --global-batch-size 16 --micro-batch-size 8 --log-every 1 --teacher-dtype fp32".split()


def train(folder: Path, *words: object, ranks: int = 1) -> list[dict[str, Any]]:
    done = warm.ranks(ranks, [RECIPE, *SMALL, "--out", folder, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guessing(tmp_path_factory.mktemp("teacher") / "run", 3)


def test_the_ratio_is_learned_and_groups_of_classes_are_judged(teacher: Path, tmp_path: Path) -> None:
    lines = train(
        tmp_path / "run", "--teachers", teacher, "--steps", 3, "--corrupted-classes", 3, "--warmup-fraction", 0
    )
    assert [0 < line["alpha"] < 1 for line in lines] == 3 * [True]
    assert lines[0]["alpha"] != lines[2]["alpha"] and lines[0]["ratio_loss"] > 0 and lines[0]["ratio_grad_norm"] > 0
    last = lines[-1]
    share = (2 * 52 + 51) / 512  # of the validation images; classes 0 and 1 have one more than the others
    both = share * last["eval/accuracy_corrupted"] + (1 - share) * last["eval/accuracy_clean"]
    assert both == pytest.approx(last["eval/accuracy"], abs=1e-6)
    assert 0 < last["eval/ratio_corrupted"] < 1 and 0 < last["eval/ratio_clean"] < 1


def test_a_control_mixes_by_its_rule(teacher: Path, tmp_path: Path) -> None:
    lines = train(tmp_path / "linear", "--teachers", teacher, "--steps", 2, "--kd-ratio", 0.8, "--ratio", "linear")
    assert [line["alpha"] for line in lines] == pytest.approx([0.8, 0.4])
    for line in lines:
        mixed = line["alpha"] * line["kd_loss"] + (1 - line["alpha"]) * line["label_loss"]
        assert line["loss"] == pytest.approx(mixed, rel=1e-5)


@pytest.mark.slow
def test_the_other_controls(teacher: Path, tmp_path: Path) -> None:
    words = ["--teachers", teacher, "--steps", 2, "--kd-ratio", 0.8]
    constant, confidence = (train(tmp_path / ratio, *words, "--ratio", ratio) for ratio in ("constant", "confidence"))
    assert [line["alpha"] for line in constant] == pytest.approx([0.8, 0.8])
    assert all(0 < line["alpha"] < 0.6 for line in confidence), "about a tenth, as the teacher guesses"


@pytest.mark.slow
def test_two_ranks_equal_one(teacher: Path, tmp_path: Path) -> None:
    """But for running statistics, which are the mean of the ranks': by them images held out are embedded."""
    words = ["--teachers", teacher, "--steps", 5, "--ratio-lr", 0.01]
    one, two = (train(tmp_path / f"of_{ranks}", *words, ranks=ranks) for ranks in (1, 2))
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "alpha", "ratio_loss", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-2), (ours["step"], name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--teachers must be given: without one there is no share of it"),
        ("--teachers cache:x", "--teachers must be models: they are asked about images that caches do not hold"),
        ("--kd-ratio 2", "--kd-ratio must be in [0, 1], got 2.0"),
        ("--temperature 0", "--temperature must be a finite number above 0, got 0.0"),
        ("--ratio-lr 0", "--ratio-lr must be a finite number above 0, got 0.0"),
        ("--ratio mine", "--ratio"),
        ("--corrupted-classes 1", "--corrupted-classes must be 0, or at least 2, got 1"),
        (
            "--teachers {teacher} --corrupted-classes 11",
            "--corrupted-classes must be at most the number of classes, 10, got 11",
        ),
        ("--held-out 0", "--held-out must be above 0 for --ratio learned, got 0.0"),
        ("--teachers {teacher} --held-out 0.005", "--held-out must be enough for a batch of 16"),
        ("--teachers x --deepspeed-config zero3_bf16.json", "needs ZeRO stage 2 or below"),
    ],
)
def test_bad_input_is_one_line(
    words: str, message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in Attempt(main, [*SMALL], tmp_path, capsys)(*words.format(teacher=teacher).split())
