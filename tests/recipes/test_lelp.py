"""LELP: with one subclass it is plain distillation, what it exports knows the classes, and bad flags are one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kd_core.images import classifiers
from kd_core.images.batches import build
from kd_core.images.flags import ImageFlags
from kd_core.images.resnets import Classifier, build_net
from kd_core.networks import taps
from recipes.logits.lelp import main
from tests import warm
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, metrics

RECIPE = ROOT / "recipes" / "logits" / "lelp.py"
SMALL = (
    "--data synthetic:10x32 --global-batch-size 16 --micro-batch-size 8 --log-every 1 --teacher-dtype fp32 --merge-classes 2 "
    "--fit-images 64"
).split()
CLASSES = ("0+2+4+6+8", "1+3+5+7+9")


def train(folder: Path, *words: object, ranks: int = 1) -> list[dict[str, Any]]:
    done = warm.ranks(ranks, [RECIPE, *SMALL, "--out", folder, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that guesses."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    net = build_net("resnet8", 2)
    whole = Classifier(net, mean=[0.5] * 3, std=[0.5] * 3)
    classifiers.save(folder, whole, net.state_dict(), CLASSES, image_size=32)
    return folder


def test_what_it_exports_is_a_classifier_of_the_classes(teacher: Path, tmp_path: Path) -> None:
    lines = train(tmp_path / "run", "--teachers", teacher, "--steps", 2, "--num-subclasses", 3)
    assert all(line["loss"] == line["kd_loss"] > 0 for line in lines)
    loaded = classifiers.load_classifier(str(tmp_path / "run"), CLASSES, flag="").eval()
    assert loaded.subclasses == 3 and taps.head(loaded).out_features == 6
    config = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert config["classes"] == list(CLASSES) and config["subclasses"] == 3
    pixels = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        summed = loaded.net(loaded.normalize(pixels)).unflatten(1, (2, 3)).softmax(2)
        assert summed.shape == (4, 2, 3)
        whole = loaded.net(loaded.normalize(pixels)).softmax(1).unflatten(1, (2, 3)).sum(2)
        torch.testing.assert_close(loaded(pixels).softmax(1), whole)
    assert 0 <= lines[-1]["eval/accuracy"] <= 1 and lines[-1]["eval/top5"] == 1


@pytest.mark.slow
def test_with_one_subclass_it_trains_as_plain_distillation(teacher: Path, tmp_path: Path) -> None:
    ours = train(tmp_path / "one", "--teachers", teacher, "--steps", 3, "--num-subclasses", 1)
    words = ["--preset", "cifar", *SMALL[:-2], "--deepspeed-config", "zero0_fp32_cpu.json", "--teachers", teacher]
    words += [
        "--kd-ratio",
        1,
        "--temperature",
        4,
        "--steps",
        3,
        "--lr",
        0.2,
        "--weight-decay",
        5e-4,
        "--out",
        tmp_path / "kd",
    ]
    done = warm.ranks(1, [ROOT / "recipes" / "resnet_kd.py", *words])
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = metrics(tmp_path / "kd")
    assert [line["kd_loss"] for line in ours] == pytest.approx([line["kd_loss"] for line in theirs], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("directions", ["kmeans", "oracle"])
def test_two_ranks_equal_one(directions: str, teacher: Path, tmp_path: Path) -> None:
    words = ["--teachers", teacher, "--steps", 4, "--directions", directions, "--num-subclasses", 5]
    one, two = (train(tmp_path / f"of_{ranks}", *words, ranks=ranks) for ranks in (1, 2))
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=2e-3), (ours["step"], name)


def test_merged_classes_are_remainders_and_their_parts_are_known() -> None:
    plain, two = (
        build(ImageFlags(data="digits", held_out=0.5)),
        build(ImageFlags(data="digits", held_out=0.5, merge_classes=3)),
    )
    assert two.classes == ("0+3+6+9", "1+4+7", "2+5+8") and two.fingerprint != plain.fingerprint
    assert plain.held_out is not None and two.held_out is not None
    for one, other in ((plain.train, two.train), (plain.validation, two.validation), (plain.held_out, two.held_out)):
        assert other.parts is not None
        assert np.array_equal(other.labels + 3 * other.parts, one.labels) and other.labels.max() == 2


def test_embeddings_are_what_the_last_linear_layer_is_given() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    given = torch.randn(3, 4)
    output, embeddings = taps.embed(model, given)
    assert taps.head(model) is model[2] and torch.equal(embeddings, model[1](model[0](given)))
    assert torch.equal(output, model[2](embeddings)) and not model[2]._forward_pre_hooks
    with pytest.raises(ValueError, match="ReLU has no linear layer"):
        taps.head(nn.ReLU())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--teachers must be given: its embeddings split the classes"),
        ("--teachers resnet18 resnet34", "--teachers must be one, whose embeddings split the classes"),
        ("--teachers cache:x", "--teachers cache:x: no cache there"),
        ("--num-subclasses 0", "--num-subclasses must be at least 1, got 0"),
        ("--beta 0", "--beta must be a finite number above 0, got 0.0"),
        ("--temperature nan", "--temperature must be a finite number above 0, got nan"),
        ("--fit-images 0", "--fit-images must be at least 1, got 0"),
        ("--directions oracle --merge-classes 0", "--directions must be oracle with --merge-classes only"),
        ("--directions best", "--directions"),
        ("--merge-classes 1", "--merge-classes must be 0, or at least 2, got 1"),
        (
            "--teachers resnet18 --merge-classes 10",
            "--merge-classes 10 of the 10 classes of --data are no fewer; give less",
        ),
        (
            "--teachers {teacher} --directions oracle",
            "--num-subclasses must be at least 5, as many classes as were merged, got 4",
        ),
        ("--teachers {teacher} --num-subclasses 60", "num_subclasses must be in 1 to"),
        (
            "--teachers {teacher} --student {teacher}",
            "has 1 outputs for each class, the run 4; give a run that has as many",
        ),
    ],
)
def test_bad_input_is_one_line(
    words: str, message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in Attempt(main, [*SMALL], tmp_path, capsys)(*words.format(teacher=teacher).split())
