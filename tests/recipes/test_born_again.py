"""Born again: a generation is trained by its equation, alpha is read off images held out, and bad flags are one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_core.images import classifiers
from kd_core.images.batches import build
from recipes.logits.born_again import Config, main, stages
from tests import warm
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, guessing, metrics

RECIPE = ROOT / "recipes" / "logits" / "born_again.py"
SMALL = "--data synthetic:10x32 --global-batch-size 16 --micro-batch-size 8 --log-every 1 --teacher-dtype fp32".split()


def generation(folder: Path, *words: object, ranks: int = 1) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    done = warm.ranks(ranks, [RECIPE, *SMALL, "--generations", 1, "--out", folder, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder), json.loads((folder / "run.json").read_text())


def by_hand(pair: list[Path]) -> float:
    """The best of a grid: what the two predict of the images held out, mixed."""
    data = build(Config(data="synthetic:10x32"))
    assert data.held_out is not None and data.held_out.pixels is not None and len(data.held_out) == 205
    pixels = torch.from_numpy(data.held_out.pixels).permute(0, 3, 1, 2)
    models = [classifiers.load_classifier(str(path), data.classes, flag="").eval() for path in pair]
    with torch.no_grad():
        u, v = (model(pixels).softmax(1).double().numpy() for model in models)
    grid, truth = np.linspace(0, 1, 2001), np.eye(10)[data.held_out.labels]
    return float(grid[np.argmin([np.square(alpha * u + (1 - alpha) * v - truth).sum() for alpha in grid])])


def test_a_generation_is_trained_by_its_equation_with_the_alpha_of_two_others(tmp_path: Path) -> None:
    first, second = (guessing(tmp_path / f"guess{seed}", seed) for seed in (1, 2))
    lines, record = generation(tmp_path / "auto", "--steps", 3, "--teachers", first, "--alpha-from", first, second)
    assert 0.1 < record["alpha"] < 0.9
    assert record["alpha"] == pytest.approx(by_hand([first, second]), abs=3e-4)
    for line in lines:
        wanted = record["alpha"] * line["label_loss"] + (1 - record["alpha"]) * line["kd_loss"]
        assert line["loss"] == pytest.approx(wanted, rel=1e-5)
        assert 0 < line["kd_loss"] < 2
    lines, record = generation(tmp_path / "labels", "--steps", 2)
    assert all(line["loss"] == line["label_loss"] and not line["kd_loss"] for line in lines) and "alpha" not in record


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    first, second = (guessing(tmp_path / f"guess{seed}", seed) for seed in (1, 2))
    words = ["--label-noise", 0.2, "--teachers", first, "--alpha-from", first, second, "--steps", 6]
    (one, its), (two, theirs) = (generation(tmp_path / f"of_{ranks}", *words, ranks=ranks) for ranks in (1, 2))
    assert theirs["alpha"] == pytest.approx(its["alpha"], rel=1e-5)
    for ours, other in zip(one, two, strict=True):
        for name in ("loss", "label_loss", "kd_loss", "grad_norm"):
            assert other[name] == pytest.approx(ours[name], rel=1e-3), (ours["step"], name)


def test_the_stages_of_a_chain() -> None:
    assert stages(Config(generations=3, alpha=0.25, seed=5)) == {
        "generation1": "--generations 1 --alpha 1 --seed 5",
        "generation2": "--generations 1 --teachers {generation1} --seed 1005 ",
        "generation3": "--generations 1 --teachers {generation2} --seed 2005 ",
    }
    named = stages(Config(generations=3))
    assert list(named) == ["generation1", "imitation", "generation2", "generation3"]
    assert named["imitation"].startswith("--generations 1 --alpha 0 --teachers {generation1}")
    assert all(named[f"generation{number}"].endswith("--alpha-from {generation1} {imitation}") for number in (2, 3))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--generations 0", "--generations must be at least 1, got 0"),
        ("--alpha 1.5", "--alpha must be auto, or in [0, 1], got 1.5"),
        ("--alpha much", "--alpha"),
        ("--teachers resnet18", "--teachers must be empty: generations teach; with --generations 1 name one"),
        ("--generations 1 --teachers resnet18", "--alpha-from must be two runs, or --alpha a number, got ()"),
        ("--alpha-from a b", "--alpha-from must be left out but for --generations 1"),
        ("--held-out 0", "--held-out must be above 0 for --alpha auto, got 0.0"),
        ("--generations 1 --global-batch-size 2048", "has 1843 training images, fewer than one batch"),
        ("--generations 1 --teachers nowhere/x/y --alpha 0", "--teachers nowhere/x/y is no folder and no model"),
        (
            "--generations 1 --teachers of_10 --alpha-from of_10 of_4",
            "--alpha-from of_4 was trained on 4 classes (0, ...)",
        ),
    ],
)
def test_bad_input_is_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for classes in (4, 10):
        guessing(tmp_path / f"of_{classes}", 1, classes)
    assert message in Attempt(main, [*SMALL], tmp_path, capsys)(*words.split())
