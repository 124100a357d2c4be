"""Cached teachers in runs of the ResNet recipe: to the last bit as the model itself, and refused for another run."""

import sys
from pathlib import Path

import pytest

from recipes.resnet_kd import main
from tests import warm
from tests.conftest import ROOT, cpu_environment, photo_folder
from tests.recipes.conftest import Attempt, check_killed_build, metrics, numbers

RECIPE = ROOT / "recipes" / "resnet_kd.py"
# Two epochs are 12 steps.
SMALL = (
    "--preset cifar --steps 15 --global-batch-size 8 --micro-batch-size 4 --lr 0.05 --log-every 1 --eval-every 15"
).split()
CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos") / "data", CLASSES, train=12, val=3)


def train(folder: Path, cache: Path, *words: object) -> None:
    command = [sys.executable, RECIPE, *SMALL, "--data", folder, *words]
    env = cpu_environment(KD_CACHE=str(cache))
    done = warm.run([*map(str, command)], env=env)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def teacher(folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    train(folder, cache, "--out", run)
    return run


@pytest.fixture(scope="module")
def build_flags(folder: Path, teacher: Path) -> list[object]:
    flags: list[object] = ["--kind", "images", "--preset", "cifar", "--data", folder, "--teacher", teacher]
    return [*flags, "--view-patterns", 2, "--micro-batch-size", 4]


@pytest.fixture(scope="module")
def cached(build_flags: list[object], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's answers, by two ranks."""
    out = tmp_path_factory.mktemp("cached") / "answers"
    done = warm.ranks(2, ["-m", "kd_core.cache", "build", *build_flags, "--out", out], KD_CACHE=str(cache))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "96 records of 16 bytes" in done.stderr and "about" in done.stderr
    return out


def test_cached_answers_equal_the_online_teacher_to_the_last_bit(
    folder: Path, teacher: Path, cached: Path, cache: Path, tmp_path: Path
) -> None:
    kd = ["--kd-ratio", 0.9, "--temperature", 4, "--temperature-stop", 1]
    train(folder, cache, *kd, "--teachers", f"cache:{cached}", "--out", tmp_path / "cached")
    train(folder, cache, *kd, "--teachers", teacher, "--out", tmp_path / "online")
    # The model alone answers, on views that are the cache's.
    other = ["--sampler", "weighted", "--teacher-weights", 0, 1, "--teachers", f"cache:{cached}", teacher]
    train(folder, cache, *kd, *other, "--out", tmp_path / "pool")
    assert numbers(tmp_path / "cached") == numbers(tmp_path / "pool")
    assert numbers(tmp_path / "cached")[:12] == numbers(tmp_path / "online")[:12], "seed 17 has the views of the cache"
    assert numbers(tmp_path / "cached")[12:] != numbers(tmp_path / "online")[12:], "the third epoch repeats the first's"
    assert {name for line in metrics(tmp_path / "pool") for name in line["teacher"]} == {str(teacher)}


def test_a_killed_build_continues_on_other_ranks_with_the_same_bytes(
    build_flags: list[object], cached: Path, cache: Path, tmp_path: Path
) -> None:
    check_killed_build(cached, build_flags, cache, tmp_path / "new")


def test_a_run_refuses_a_cache_of_something_else(
    folder: Path, cached: Path, cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("KD_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    kd = ["--kd-ratio", 0.9, "--teachers", f"cache:{cached}"]
    attempt = Attempt(main, [*SMALL, "--data", folder, *kd], tmp_path, capsys)
    for flag, only in (("mixup", 0), ("cutmix", 0), ("resize-from", 1)):
        assert f"--{flag} must be {only} for cached teachers, who saw other pixels, got 0.5" in attempt(
            f"--{flag}", 0.5
        )
    foreign = photo_folder(tmp_path / "foreign", CLASSES, train=11, val=3)
    renamed = photo_folder(tmp_path / "renamed", ("ant", "bee", "cat", "eel"), train=12, val=3)
    for words, setting in (
        (["--crop", "resized"], "crop 'padded', the run 'resized'"), (["--train-size", 28], "train_size 32, the run 28"),
        (["--teacher-dtype", "bf16"], "teacher_dtype 'fp32', the run 'bf16'"), (["--teacher-size", 0], "teacher_size None"),
        (["--randaugment", 9], "randaugment 0"), (["--data", foreign], "data "), (["--data", renamed], "classes "),
    ):  # fmt: skip
        assert f"cache:{cached} has {setting}" in attempt(*words)
    assert "no cache there" in attempt("--teachers", "cache:nowhere")
