"""MEAL V2: the mean is the only target, the discriminator's sign is what it says, and bad flags are one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from kd_core.images import classifiers
from kd_core.images.resnets import BatchNorm
from kd_core.losses.adversarial import Discriminator, fooled, told_apart
from recipes.logits.meal_v2 import Config, main
from tests import warm
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, guessing, metrics

RECIPE = ROOT / "recipes" / "logits" / "meal_v2.py"
SMALL = "--data synthetic:10x32 --global-batch-size 16 --micro-batch-size 8 --log-every 1 --teacher-dtype fp32".split()


def train(folder: Path, *words: object, ranks: int = 1) -> list[dict[str, Any]]:
    done = warm.ranks(ranks, [RECIPE, *SMALL, "--out", folder, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [guessing(tmp_path_factory.mktemp("teacher") / "run", seed) for seed in range(3)]


def test_the_mean_is_the_only_target_and_a_discriminator_adds_what_it_says(
    teachers: list[Path], tmp_path: Path
) -> None:
    words = ["--student", teachers[0], "--teachers", *teachers, "--steps", 2]
    lines = train(tmp_path / "run", *words, "--discriminator", "adversarial", "--discriminator-weight", 0.25)
    for line in lines:
        assert len(line["teacher"]) == 3
        assert line["loss"] == pytest.approx(line["kd_loss"] + 0.25 * line["fooled_loss"], rel=1e-5)
        assert line["discriminator_loss"] > 0
    drawn = train(tmp_path / "drawn", *words, "--sampler", "uniform")
    assert {len(line["teacher"]) for line in drawn} == {1}
    assert all(line["loss"] == line["kd_loss"] for line in drawn)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["weight_decay"] == 0


def test_the_discriminator_learns_to_tell_and_the_student_to_deceive_it() -> None:
    torch.manual_seed(0)
    judge, student = Discriminator(10), (2 * torch.randn(64, 10)).requires_grad_()
    teacher = 6 * torch.randn(64, 10)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
    first = None
    for _ in range(60):
        loss = told_apart(judge(teacher), judge(student.detach())).mean()
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7 * first
    log_odds = judge(student)
    assert float(judge(teacher).detach().mean()) > 0.5 + float(log_odds.detach().mean()), "it takes one for the other"
    for cooperative, sign in ((False, 1), (True, -1)):
        (gradient,) = torch.autograd.grad(fooled(log_odds, cooperative=cooperative).sum(), student, retain_graph=True)
        moved = judge(student - 0.1 * gradient)
        assert sign * float((moved - log_odds).mean()) > 0, "the sign is the other one"
    torch.testing.assert_close(judge(student), judge(student + 5), rtol=1e-4, atol=1e-5)


def test_a_student_may_begin_with_the_weights_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torchvision.models.get_model
    trained = made("resnet18", weights=None)
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights=None, **own: trained if weights else made(name, **own)
    )
    classes = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    model = classifiers.build_student("resnet18:IMAGENET1K_V1", classes, seed=1)
    assert isinstance(model.net.bn1, BatchNorm) and model.net.built_as["model"] == "resnet18"
    for name, weight in trained.state_dict().items():
        assert torch.equal(model.net.state_dict()[name], weight), name
    with pytest.raises(ValueError, match=r"--student resnet18:V9: resnet18 has the weights"):
        classifiers.check_student("resnet18:V9")


def test_the_preset_has_no_weight_decay() -> None:
    assert Config.PRESETS["imagenet"]["weight_decay"] == Config().weight_decay == 0
    assert Config.PRESETS["imagenet"]["lr"] == 0.01 and Config().sampler == "all"


@pytest.mark.slow
def test_two_ranks_equal_one(teachers: list[Path], tmp_path: Path) -> None:
    words = ["--teachers", *teachers, "--steps", 6, "--discriminator", "cooperative"]
    one, two = (train(tmp_path / f"of_{ranks}", *words, ranks=ranks) for ranks in (1, 2))
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "kd_loss", "fooled_loss", "discriminator_loss", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3), (ours["step"], name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--teachers must be given: their mean is the only target"),
        ("--temperature 0", "--temperature must be a finite number above 0, got 0.0"),
        ("--discriminator-weight -1", "--discriminator-weight must be a finite number, at least 0, got -1.0"),
        ("--discriminator-lr nan", "--discriminator-lr must be a finite number above 0, got nan"),
        ("--discriminator good", "--discriminator"),
        ("--teachers resnet18 --student resnet9", "--student resnet9 is no folder and no known size"),
        ("--teachers resnet18 --student resnet18:V9", "--student resnet18:V9: resnet18 has the weights"),
        ("--teachers nowhere/x/y", "--teachers nowhere/x/y is no folder and no model of torchvision"),
    ],
)
def test_bad_input_is_one_line(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in Attempt(main, [*SMALL], tmp_path, capsys)(*words.split())
