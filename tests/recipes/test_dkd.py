"""Decoupled knowledge distillation: the loss that is trained is the equation, and bad flags are one line."""

import sys
from pathlib import Path

import pytest

from kd_core.images import classifiers
from kd_core.images.resnets import Classifier, build_net
from recipes.logits.dkd import main
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, metrics
from tests.recipes.test_every_recipe import begin, run

SMALL = "--data synthetic:10x32 --global-batch-size 16 --micro-batch-size 8".split()


def test_the_loss_is_the_equation_and_the_weight_rises(tmp_path: Path) -> None:
    recipe = [sys.executable, str(ROOT / "recipes" / "logits" / "dkd.py"), *SMALL, "--log-every", "1"]
    run([*recipe, "--steps", "2", "--out", "teacher"], 1, tmp_path)
    taught = ["--teachers", "teacher", "--alpha", "0.5", "--beta", "2", "--kd-warmup", "0.5"]
    run([*recipe, "--steps", "8", *taught, "--out", "run"], 1, tmp_path)
    lines = metrics(tmp_path / "run")
    assert [line["kd_weight"] for line in lines] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    for line in lines:
        kd = 0.5 * line["class_kl"] + 2 * line["others_kl"]
        assert line["loss"] == pytest.approx(line["label_loss"] + line["kd_weight"] * kd, rel=1e-5)
    assert lines[-1]["class_kl"] > 0 and lines[-1]["others_kl"] > 0
    assert {line["class_kl"] for line in metrics(tmp_path / "teacher")} == {0.0}


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """The micro-batches are the same; they are summed over two processes, or one after the other."""
    recipe = [sys.executable, str(ROOT / "recipes" / "logits" / "dkd.py"), *SMALL, "--log-every", "1", "--steps", "6"]
    run([*recipe, "--out", "teacher"], 1, tmp_path)
    for ranks in (1, 2):
        run([*recipe, "--teachers", "teacher", "--out", f"of_{ranks}"], ranks, tmp_path)
    for one, two in zip(metrics(tmp_path / "of_1"), metrics(tmp_path / "of_2"), strict=True):
        for name in ("loss", "label_loss", "class_kl", "others_kl", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), (one["step"], name)


def test_the_answers_may_come_from_a_cache(tmp_path: Path) -> None:
    recipe = [sys.executable, str(ROOT / "recipes" / "logits" / "dkd.py"), *SMALL, "--log-every", "1", "--steps", "2"]
    run([*recipe, "--out", "teacher"], 1, tmp_path)
    build = [sys.executable, "-m", "kd_core.cache", "build", "--kind", "images", "--preset", "cifar", *SMALL[:2]]
    build += ["--teacher", "teacher", "--micro-batch-size", "8", "--teacher-dtype", "bf16"]
    run([*build, "--out", "whole"], 1, tmp_path)
    run([*recipe, "--teachers", "cache:whole", "--out", "run"], 1, tmp_path)
    assert metrics(tmp_path / "run")[-1]["others_kl"] > 0
    run([*build, "--top-k", "3", "--temperatures", "2", "--out", "top"], 1, tmp_path)
    (refused,) = begin([*recipe, "--teachers", "cache:top", "--out", "refused"], 1, tmp_path)
    assert refused.wait(120) == 2
    last = (tmp_path / "0.log").read_text().splitlines()[-1]
    assert last.startswith(
        "error: --teachers cache:top holds the top 3 at the temperatures [2.0], the run uses [4.0]; choose"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--alpha -1", "--alpha must be a finite number, at least 0, got -1.0"),
        ("--beta nan", "--beta must be a finite number, at least 0, got nan"),
        ("--temperature 0", "--temperature must be a finite number above 0, got 0.0"),
        ("--kd-warmup 2", "--kd-warmup must be in [0, 1], got 2.0"),
        ("--held-out 1", "--held-out must be in [0, 1), got 1.0"),
        ("--held-out 0.0001", "--held-out 0.0001 of the 2048 training images is none; give more"),
        ("--label-noise nan", "--label-noise must be in [0, 1), got nan"),
        ("--student resnet9", "--student resnet9 is no folder and no known size"),
        ("--teachers nowhere/x/y", "--teachers nowhere/x/y is no folder and no model of torchvision"),
        ("--data nowhere/x/y", "--data nowhere/x/y"),
        ("--data empty", "--data empty holds 0 images in 0 class folders"),
        ("--teachers of_4", "--teachers of_4 was trained on 4 classes (a, ...), the data has 10 (0, ...)"),
        ("--teachers cache:nowhere", "--teachers cache:nowhere: no cache there"),
    ],
)
def test_bad_input_is_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "of_4"):
        (tmp_path / folder).mkdir()
    net = build_net("resnet8", 4)
    classifiers.save(
        tmp_path / "of_4", Classifier(net, mean=[0.5] * 3, std=[0.5] * 3), net.state_dict(), list("abcd"), image_size=32
    )
    assert message in Attempt(main, [*SMALL], tmp_path, capsys)(*words.split())
