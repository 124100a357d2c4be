"""SSLD: labels teach nothing, unlabelled images are seen until the fine-tuning, what was chosen stays, and bad flags are one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_core.losses.divergences import forward_kl, jeffreys, jensen_shannon
from recipes.logits.ssld import DIVERGENCES, Config, main
from tests import warm
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, guessing, metrics

RECIPE = ROOT / "recipes" / "logits" / "ssld.py"
SMALL = "--data synthetic:10x32 --global-batch-size 16 --micro-batch-size 8 --log-every 1 --held-out 0.5".split()


def train(folder: Path, *words: object, ranks: int = 1) -> list[dict[str, Any]]:
    done = warm.ranks(ranks, [RECIPE, *SMALL, "--out", folder, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guessing(tmp_path_factory.mktemp("teacher") / "run", 3)


def test_labels_teach_nothing_and_the_unlabelled_images_leave_for_the_fine_tuning(
    teacher: Path, tmp_path: Path
) -> None:
    """Without unlabelled images, and with wrong labels, the fine-tuning is the same, and it alone."""
    words = ["--teachers", teacher, "--steps", 4, "--fine-tune", 0.5, "--warmup-fraction", 0, "--lr", 1e-12]
    both = train(tmp_path / "both", *words, "--per-class", 20)
    alone = train(tmp_path / "alone", *words, "--select", "none", "--label-noise", 0.9)
    assert all(0 < line["loss"] < np.log(2) for line in both)
    same = [one["loss"] == pytest.approx(other["loss"], rel=1e-4) for one, other in zip(both, alone, strict=True)]
    assert same == [False, False, True, True]
    chosen = np.load(tmp_path / "both" / "selected.npy")
    record = json.loads((tmp_path / "both" / "run.json").read_text())
    assert record["selected"]["images"] == len(chosen) == len(set(chosen.tolist())) and 20 <= len(chosen) <= 200
    assert chosen.max() < 1024, "of the images held out"


def test_the_rate_begins_anew_for_the_fine_tuning() -> None:
    cfg = Config(steps=100, fine_tune=0.25, fine_tune_lr=0.1, lr=0.4, warmup_fraction=0)
    assert cfg.tuning == 75 and cfg.lr_at(0) == 0.4 and cfg.lr_at(74) < 0.001
    assert cfg.lr_at(75) == pytest.approx(0.04) and cfg.lr_at(99) < 0.001


def test_other_divergences_have_the_curvature_of_jensen_shannon() -> None:
    teacher = 2 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    near = teacher + 5e-2 * torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    values = [scale * one(near, teacher) for one, scale in DIVERGENCES.values()]
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=0.05, atol=1e-6)


def test_jensen_shannon_is_bounded_symmetric_and_at_most_an_eighth_of_jeffreys() -> None:
    pairs = [
        scale * torch.randn(2, 200, 10, generator=torch.Generator().manual_seed(seed))
        for seed, scale in enumerate((0.3, 2.0, 30.0))
    ]
    one, other = torch.cat(pairs, 1)
    js = jensen_shannon(one, other)
    torch.testing.assert_close(js, jensen_shannon(other, one), rtol=1e-4, atol=1e-6)
    assert (js >= 0).all() and (js <= np.log(2) + 1e-6).all()
    assert (js <= jeffreys(one, other) / 8 + 1e-6).all()
    assert (js > forward_kl(one, other) / 4).any(), "a KL may be above or below four times of it"


@pytest.mark.slow
def test_two_ranks_choose_and_train_as_one(teacher: Path, tmp_path: Path) -> None:
    words = ["--teachers", teacher, "--steps", 6, "--per-class", 20, "--fine-tune", 0.34]
    one, two = (train(tmp_path / f"of_{ranks}", *words, ranks=ranks) for ranks in (1, 2))
    chosen = [set(np.load(tmp_path / f"of_{ranks}" / "selected.npy").tolist()) for ranks in (1, 2)]
    assert chosen[0] == chosen[1]
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3), (ours["step"], name)


@pytest.mark.slow
def test_random_images_are_as_many_as_the_best_and_all_are_all(teacher: Path, tmp_path: Path) -> None:
    count = {}
    for select in ("top", "random", "all", "none"):
        train(tmp_path / select, "--teachers", teacher, "--steps", 2, "--per-class", 20, "--select", select)
        count[select] = len(np.load(tmp_path / select / "selected.npy"))
    assert count["random"] == count["top"] and (count["all"], count["none"]) == (1024, 0)
    random = np.load(tmp_path / "random" / "selected.npy")
    assert set(random.tolist()) != set(np.load(tmp_path / "top" / "selected.npy").tolist())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--per-class 5", "--teachers must be given: without labels nobody else says what is right"),
        ("--teachers x --per-class 0", "--per-class must be at least 1, got 0"),
        ("--teachers x --temperature 0", "--temperature must be a finite number above 0, got 0.0"),
        ("--teachers x --fine-tune 1", "--fine-tune must be in [0, 1), got 1.0"),
        ("--teachers x --fine-tune-lr 0", "--fine-tune-lr must be a finite number above 0, got 0.0"),
        ("--teachers x --select best", "--select"),
        ("--teachers cache:x", "--teachers must be models: they are asked about images that caches do not hold"),
        ("--teachers nowhere/x/y", "--teachers nowhere/x/y is no folder and no model of torchvision"),
        (
            "--teachers resnet18 --per-class 1025",
            "--per-class must be at most the number of unlabelled images, 1024, got",
        ),
        ("--teachers resnet18 --held-out 0", "--select must be none, or --unlabelled or --held-out given, got top"),
        ("--teachers resnet18 --unlabelled nowhere/x/y", "--unlabelled nowhere/x/y: no such file or folder"),
        ("--teachers resnet18 --unlabelled empty", "--unlabelled empty"),
    ],
)
def test_bad_input_is_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert message in Attempt(main, [*SMALL], tmp_path, capsys)(*words.split())
