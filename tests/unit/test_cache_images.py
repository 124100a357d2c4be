"""Cached answers of image classifiers: the model's own on the run's views, the top k, corrupt images, flags."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd_core.cache import images as cache_images
from kd_core.cache import records as cache
from kd_core.cache.__main__ import main
from kd_core.cache.logits import CachedLogits
from kd_core.images import batches as images
from kd_core.images import classifiers, resnets
from kd_core.images import sources as image_sources
from kd_core.images.views import View
from recipes.resnet_kd import Config
from tests.conftest import photo_folder

CLASSES = ("ant", "bee", "cat", "dog")
VIEW = {"train_size": 24, "eval_resize": 32, "eval_size": 24, "view_patterns": 3, "micro_batch_size": 5}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.dist, "barrier", lambda: None)
    monkeypatch.setattr(cache_images, "join", lambda prepare: prepare())
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photo_folder(tmp_path / "data", CLASSES, train=4, val=2)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = resnets.Classifier(resnets.build_net("resnet8", 4))
    (tmp_path / "teacher").mkdir()
    classifiers.save(tmp_path / "teacher", model, model.state_dict(), CLASSES, image_size=20)
    return tmp_path / "teacher"


def build(teacher: Path, data: Path, out: Path, **flags: Any) -> Path:
    cache_images.build(cache_images.BuildFlags(teacher=str(teacher), data=str(data), out=str(out), **VIEW | flags))
    return out


def run_of(answers: Path, **flags: Any) -> Any:
    """What `cache_images.views` reads of a run."""
    fields = {field.name: field.default for field in dataclasses.fields(Config)}
    return SimpleNamespace(**fields | VIEW | {"teachers": (f"cache:{answers}",), "distils": True} | flags)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("damaged", [False, True])
def test_answers_are_the_models_own_on_the_views_of_the_run(
    dtype: Any, damaged: bool, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"teacher_dtype": dtype}
    if damaged:
        (folder / "train" / "cat" / "1.jpg").write_bytes(b"damaged")
        flags |= {"decoded_gib": 0, "max_corrupt": 0.1}
    answers = build(teacher, folder, tmp_path / "answers", **flags)
    data = image_sources.prepare(str(folder), decoded_gib=0 if damaged else 1, max_corrupt=0.1)
    views = cache_images.views(run_of(answers, teacher_dtype=dtype), data)
    assert views == {"view_seed": 17, "view_patterns": 3}
    online = classifiers.load_teacher(str(teacher), data.classes, flag="", autocast=dtype == "bf16").eval()
    cached = CachedLogits(answers, 4)
    batches = images.TrainBatches(data.train, View(24), 10, 7, 5, 5, 0, 1, **views)
    replaced = 0
    for number in range(16):  # five epochs
        micro = batches[number]
        replaced += int(micro.corrupt)
        with torch.no_grad():
            expected = online(micro.pixels)
        assert torch.equal(cached(*micro.keys, 2.0), expected)
        assert expected.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert replaced == 5 * damaged


def test_the_score_is_the_models_on_the_validation_images(teacher: Path, folder: Path, tmp_path: Path) -> None:
    cached = CachedLogits(build(teacher, folder, tmp_path / "answers", teacher_dtype="fp32"), 4)
    data = image_sources.prepare(str(folder), decoded_gib=1, max_corrupt=0)
    micro = images.ValidationBatches(data.validation, 32, 24, 8, 0, 1)[0]
    with torch.no_grad():
        logits = classifiers.load_classifier(str(teacher), CLASSES, flag="").eval()(micro.pixels)
    loss = float(torch.nn.functional.cross_entropy(logits, micro.labels))
    assert cached.score["eval/loss"] == pytest.approx(loss)
    assert cached.score["eval/accuracy"] == float((logits.argmax(-1) == micro.labels).float().mean())


def test_the_top_k_is_exact_at_the_temperatures_of_the_build_alone(teacher: Path, folder: Path, tmp_path: Path) -> None:
    whole = build(teacher, folder, tmp_path / "whole", teacher_dtype="fp32")
    top = build(teacher, folder, tmp_path / "top", teacher_dtype="fp32", top_k=2, temperatures=(1.0, 3.0))
    data = image_sources.prepare(str(folder), decoded_gib=1, max_corrupt=0)
    keys = torch.arange(16), torch.arange(16) % 3
    exact, kept = ((CachedLogits(answers, 4)(*keys, 3.0) / 3).softmax(-1) for answers in (whole, top))
    best = exact.topk(2).indices
    torch.testing.assert_close(kept.gather(1, best), exact.gather(1, best), rtol=1e-5, atol=0)
    assert kept.scatter(1, best, 2).topk(2, largest=False).values.diff().abs().max() < 1e-7, "the tail is shared evenly"
    assert cache_images.views(run_of(top, teacher_dtype="fp32", temperature=3.0), data)
    with pytest.raises(ValueError, match=r"the top 2 at the temperatures \[1.0, 3.0\], the run uses \[2.0\]"):
        cache_images.views(run_of(top, teacher_dtype="fp32", temperature=2.0), data)
    for method in ({"divergence": "mse"}, {"ensemble": "logits"}):
        with pytest.raises(ValueError, match="the top 2, which give probabilities but no raw logits"):
            cache_images.views(run_of(top, teacher_dtype="fp32", temperature=3.0, **method), data)
    with pytest.raises(ValueError, match="--top-k must be below the number of classes, 4, got 4"):
        build(teacher, folder, tmp_path / "more", top_k=4)


def test_a_build_stops_at_too_many_corrupt_images(teacher: Path, folder: Path, tmp_path: Path) -> None:
    for name in ("ant/1.jpg", "bee/3.jpg"):
        (folder / "train" / name).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="2 of 16 images are corrupt"):
        build(teacher, folder, tmp_path / "answers", decoded_gib=0, max_corrupt=0.1)


def test_flags_are_the_recipes() -> None:
    names = {field.name for field in dataclasses.fields(cache_images.BuildFlags)}
    shared = names & {field.name for field in dataclasses.fields(Config)} - {"out", "data"}
    assert set(cache_images.BuildFlags.AGREE) <= shared
    for preset in (None, *Config.PRESETS):
        ours = cache_images.BuildFlags(**cache_images.BuildFlags.PRESETS.get(preset, {}))
        recipes = Config(**Config.PRESETS.get(preset, {}))
        assert {name: getattr(ours, name) for name in shared} == {name: getattr(recipes, name) for name in shared}


def test_bad_commands_are_one_line(
    teacher: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        with pytest.raises(SystemExit) as end:
            main(["build", *map(str, words)])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--kind must be one of ['images', 'mlm'], got audio" in refused("--kind", "audio")
    small = ("--kind", "images", "--preset", "cifar", "--data", folder)
    assert "--preset must be one of ['baseline-90', 'cifar', 'mild-36']" in refused(*small, "--preset", "hot")
    assert "--teacher must be given" in refused(*small, "--out", tmp_path / "answers")
    assert "--out must be given" in refused(*small, "--teacher", teacher)
    assert "--view-patterns must be at least 1, got 0" in refused(*small, "--view-patterns", 0)
    assert "unknown flag --mask-seed" in refused(*small, "--mask-seed", 0)
    both = ("--teacher", "cache:answers", "--out", tmp_path / "answers")
    assert "--teacher must be given, and a model, got cache:answers" in refused(*small, *both)
