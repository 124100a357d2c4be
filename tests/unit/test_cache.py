"""Storage of cached answers: found by key, continued after a kill with the same bytes, refused when anything is off."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from kd_core.cache import mlm as cache_mlm
from kd_core.cache import records as cache
from kd_core.cache.logits import logits_of_top_k, top_k
from kd_core.system.files import Unwritable
from recipes import bert_kd
from tests.conftest import ROOT, cpu_environment

SETTINGS = {"kind": "test", "seed": 3}
LAYOUT = cache.Layout(
    [("ids", "<i4", (2, 3)), ("logits", "<f4", (2,))], num_samples=300, num_patterns=3, batch_records=4
)


def answer(indices: range) -> np.ndarray:
    """Records that tell which they are."""
    records = np.empty(len(indices), LAYOUT.dtype)
    numbers = np.asarray(indices)
    records["ids"] = numbers[:, None, None] + np.arange(6).reshape(2, 3)
    records["logits"] = numbers[:, None] / 7
    return records


def build(
    folder: Path,
    settings: dict[str, Any] = SETTINGS,
    answer: Callable[[range], np.ndarray] = answer,
    score: float = 4.5,
) -> None:
    def companions(new: Path) -> None:
        (new / "head.bin").write_bytes(b"head")

    cache.build(folder, settings, LAYOUT, answer, companions, lambda: {"eval/loss": score})


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.dist, "barrier", lambda: None)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    build(tmp_path / "built")
    return tmp_path / "built"


def test_records_are_found_by_sample_and_pattern(built: Path) -> None:
    assert len(LAYOUT.parts) == 57, "sixteen records, four batches, a part"
    records = cache.Records(built, LAYOUT)
    samples, patterns = np.array([299, 0, 17, 17]), np.array([2, 0, 1, 2])
    taken = records.take(samples, patterns)
    assert taken["ids"][:, 0, 0].tolist() == [2 * 300 + 299, 0, 317, 617]
    np.testing.assert_array_equal(taken["logits"][:, 1], np.float32([899, 0, 317, 617]) / np.float32(7))
    assert cache.read_manifest(built)["score"] == {"eval/loss": 4.5}
    assert not list(built.glob("part-*.json"))


def test_a_build_that_was_killed_continues_and_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    asked: list[range] = []

    def killed(indices: range) -> np.ndarray:
        if len(indices) > 4 and len(asked) == 20:
            raise KeyboardInterrupt
        asked.append(indices)
        return answer(indices)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", answer=killed)
    with pytest.raises(ValueError, match=r"killed is not complete; repeat its build"):
        cache.require(tmp_path / "killed", SETTINGS)
    with pytest.raises(ValueError, match="has begun with another seed, 3, now 4"):
        build(tmp_path / "killed", settings=SETTINGS | {"seed": 4})
    before = len(asked)
    asked.append(range(0))
    build(tmp_path / "killed", answer=killed)
    assert len(asked) - before < 57, "parts that were there are computed again"
    names = sorted(file.name for file in built.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "killed").iterdir())
    for name in set(names) - {"build.json"}:
        assert (built / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["part-00040.bin", "head.bin"])
def test_a_damaged_cache_is_refused(built: Path, name: str) -> None:
    file = built / name
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole + b" ", bytes([whole[0] ^ 1]) + whole[1:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged .*; delete the cache and build it again"):
            cache.require(built, SETTINGS)
    file.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        cache.require(built, SETTINGS)


@pytest.mark.parametrize("content", ["", "{}", "null", "[1]", '{"score": {}, "sha256": {}}', "part"])
def test_a_manifest_of_another_shape_is_refused(built: Path, content: str) -> None:
    if content == "part":
        manifest = cache.read_manifest(built)
        del manifest["sha256"]["part-00007.bin"]
        content = json.dumps(manifest)
    (built / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"(manifest|header)\.json is damaged .*; delete the cache and build it again"):
        cache.require(built, SETTINGS)


def test_what_is_damaged_in_half_a_cache_is_computed_again(built: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"

    def killed(indices: range) -> np.ndarray:
        if indices.start > 100:
            raise KeyboardInterrupt
        return answer(indices)

    with pytest.raises(KeyboardInterrupt):
        build(half, answer=killed)
    (half / "part-00001.json").write_text("")
    (half / "part-00002.json").write_text("[]")
    (half / "part-00003.bin").write_bytes(b"half")
    build(half, SETTINGS | {"teacher": "by another name"})
    for file in built.glob("part-*.bin"):
        assert file.read_bytes() == (half / file.name).read_bytes(), file.name
    assert not list(half.glob(".*"))
    (half / "manifest.json").unlink()
    (half / "header.json").write_text('{"format"')
    with pytest.raises(ValueError, match=r"half/header\.json is damaged .*; delete the cache and build it again"):
        build(half)


def test_a_folder_has_one_build_at_a_time(tmp_path: Path) -> None:
    asked: list[int] = []

    def ask(indices: range) -> np.ndarray:
        if not asked:
            asked.append(1)
            again = f"import tests.unit.test_cache as t, pathlib; t.build(pathlib.Path({str(tmp_path / 'new')!r}))"
            env = cpu_environment(PYTHONPATH=str(ROOT))
            done = subprocess.run([sys.executable, "-c", again], env=env, capture_output=True, text=True)
            assert f"new is in use by process {os.getpid()} on " in done.stderr
        return answer(indices)

    build(tmp_path / "new", answer=ask)
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_is_one_line(error: Exception, tmp_path: Path) -> None:
    def full(indices: range) -> np.ndarray:
        raise error

    told = r"full cannot be written \(No space left on device: more than .*B needed, .*B free\); make room there and repeat"
    with pytest.raises(Unwritable, match=told):
        build(tmp_path / "full", answer=full)


def test_a_teacher_without_finite_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the teacher of --out .*nan answers with no finite numbers"):
        build(tmp_path / "nan", score=math.nan)
    assert not (tmp_path / "nan").exists()


def test_a_damaged_header_is_refused(built: Path) -> None:
    (built / "header.json").write_text((built / "header.json").read_text()[:-5])
    with pytest.raises(ValueError, match=r"header\.json is damaged"):
        cache.require(built, SETTINGS)


def test_a_foreign_cache_is_refused_with_the_setting_that_differs(built: Path, tmp_path: Path) -> None:
    assert cache.require(built, SETTINGS)["layout"]["num_samples"] == 300
    with pytest.raises(ValueError, match=r"has seed 3, the run 5; choose the run's flags"):
        cache.require(built, SETTINGS | {"seed": 5})
    with pytest.raises(FileNotFoundError, match="no cache there"):
        cache.require(tmp_path / "nowhere", SETTINGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ValueError, match="neither an empty folder nor a cache"):
        build(tmp_path / "other")
    with pytest.raises(ValueError, match="neither an empty folder nor a cache"):
        build(tmp_path / "other" / "file")
    with pytest.raises(ValueError, match="is a complete cache"):
        build(built)


def test_too_small_a_disk_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="make room"):
        build(tmp_path / "full")
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize(("flag", "value"), [("mask_fraction", 0.0), ("mask_fraction", 2.0), ("seq_len", 4096)])
def test_flags_of_a_build_are_checked_as_the_recipes(flag: str, value: float) -> None:
    for flags in (cache_mlm.BuildFlags, bert_kd.Config):
        with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} must be .*, got {value}"):
            flags(**{flag: value})


def test_top_k_keeps_probabilities_and_the_mass_of_the_tail_exactly() -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(40, 300)
    stored = top_k(logits, 8, (1.0, 2.5))
    for place, temperature in enumerate((1.0, 2.5)):
        exact = (logits.double() / temperature).softmax(-1)
        kept = (logits_of_top_k(stored, place, temperature, 300).double() / temperature).softmax(-1)
        top = stored["ids"].long()
        torch.testing.assert_close(kept.gather(1, top), exact.gather(1, top), rtol=1e-5, atol=0)
        tail = kept.scatter(1, top, 0.0)
        torch.testing.assert_close(tail.sum(-1), exact.scatter(1, top, 0.0).sum(-1), rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(tail.max(-1).values, tail.sum(-1) / 292, rtol=1e-6, atol=0)


def test_a_part_of_another_size_is_named(tmp_path: Path) -> None:
    build(tmp_path / "cache")
    part = tmp_path / "cache" / "part-00000.bin"
    for content in (part.read_bytes()[: -LAYOUT.dtype.itemsize], b"x"):
        part.write_bytes(content)
        with pytest.raises(ValueError, match=r"part-00000\.bin is damaged \(it does not hold \d+ records"):
            cache.Records(tmp_path / "cache", LAYOUT)
