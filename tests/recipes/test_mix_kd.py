"""MIX-KD: the loss that is trained is the equation on mixed images, ranks mix the same ones, and bad flags are one line."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kd_core.images import classifiers
from kd_core.images.batches import TrainBatches
from kd_core.images.sources import prepare
from kd_core.images.views import View
from recipes.logits.mix_kd import main
from tests import warm
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, guessing, metrics

RECIPE = ROOT / "recipes" / "logits" / "mix_kd.py"
SMALL = "--data synthetic:10x32 --global-batch-size 16 --micro-batch-size 8 --log-every 1".split()


def train(folder: Path, *words: object, ranks: int = 1) -> list[dict[str, float]]:
    done = warm.ranks(ranks, [RECIPE, *SMALL, "--out", folder, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder)


def test_the_first_step_and_the_last_evaluation_are_the_equations(tmp_path: Path) -> None:
    taught = [
        "--teachers",
        guessing(tmp_path / "teacher", 1),
        "--teacher-dtype",
        "fp32",
        "--kd-ratio",
        0.75,
        "--steps",
        3,
    ]
    lines = train(tmp_path / "run", *taught, "--mix-share", 0)
    for line in lines:
        assert line["loss"] == pytest.approx(0.25 * line["label_loss"] + 0.75 * line["kd_loss"], rel=1e-5)
    data = prepare("synthetic:10x32", decoded_gib=1, max_corrupt=0)
    teacher = classifiers.load_classifier(str(tmp_path / "teacher"), data.classes, flag="").eval()
    student = classifiers.build_student("resnet8", data.classes, seed=17)
    label_sum = kd_sum = 0.0
    for number in range(2):
        micro = TrainBatches(data.train, View(32, "padded"), 3, 17, 16, 8, 0, 1)[number]
        with torch.no_grad():
            ours, theirs = (
                logits / logits.std(1, keepdim=True) for logits in (student(micro.pixels), teacher(micro.pixels))
            )
        label_sum += float(F.cross_entropy(ours, micro.labels, reduction="sum"))
        kd_sum += float(F.kl_div(ours.log_softmax(1), theirs.softmax(1), reduction="sum"))
    assert lines[0]["label_loss"] == pytest.approx(label_sum / 16, rel=1e-4)
    assert lines[0]["kd_loss"] == pytest.approx(kd_sum / 16, rel=1e-3)
    trained = classifiers.load_classifier(str(tmp_path / "run"), data.classes, flag="").eval()
    with torch.no_grad():
        logits = trained(torch.from_numpy(data.validation.pixels).permute(0, 3, 1, 2))
    loss = F.cross_entropy(logits / logits.std(1, keepdim=True), torch.from_numpy(data.validation.labels))
    assert lines[-1]["eval/loss"] == pytest.approx(float(loss), rel=1e-4)
    mixed = train(tmp_path / "mixed", *taught, "--mix-share", 0.5, "--steps", 1)
    assert mixed[0]["label_loss"] != lines[0]["label_loss"], "nothing was mixed"


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """The micro-batches are the same, and so is what is mixed in them."""
    words = ["--teachers", guessing(tmp_path / "teacher", 1), "--mix-share", 0.5, "--steps", 6]
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
