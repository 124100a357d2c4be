"""Teachers in runs of the recipe: samplers, placements, window's edges and caches, across kills and resumes."""

import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM

from kd_core.runs.folders import read_record, write_record
from kd_core.system.splits import VALIDATION_ONE_IN
from kd_core.text.documents import text_digest
from recipes.bert_kd import main
from tests import warm
from tests.recipes.conftest import RECIPE, SMALL, check_killed_build, killed_and_resumed, metrics, numbers, trace

Train = Callable[..., subprocess.CompletedProcess[str]]
# The window is open from step 3 to step 8 of 12, its first steps a checkpoint, its end between two.
EDGES = ["--steps", 12, "--micro-batch-size", 2, "--kd-ratio", 0.9, "--kd-start", 0.25, "--kd-stop", 0.7]


@pytest.fixture(scope="module")
def short_file(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So little text that 60 steps of 8 rows reach the second epoch."""
    file = tmp_path_factory.mktemp("short") / "short.txt"
    texts = corpus_file.read_text().split("\n\n")
    validation = next(text for text in texts if text_digest(text) % VALIDATION_ONE_IN == 0)
    file.write_text("\n\n".join([validation, *texts[:48]]))
    return file


@pytest.fixture(scope="module")
def bad_teacher(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sure of wrong answers."""
    folder = tmp_path_factory.mktemp("bad") / "hf"
    shutil.copytree(teacher / "hf", folder)
    model = BertForMaskedLM.from_pretrained(folder)
    torch.nn.init.normal_(model.cls.predictions.decoder.bias, std=20.0)
    model.save_pretrained(folder)
    return folder


def build(cache: Path, *words: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    flags = ["--seq-len", 32, "--mask-patterns", 2, "--micro-batch-size", 4, *words]
    return warm.ranks(ranks, ["-m", "kd_core.cache", "build", *flags], KD_CACHE=str(cache))


@pytest.fixture(scope="module")
def cached(teacher: Path, short_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 answers of the teacher, by two ranks."""
    folder = tmp_path_factory.mktemp("cached") / "answers"
    source = ["--teacher", teacher, "--tokenizer", teacher / "hf", "--data", short_file, "--teacher-dtype", "fp32"]
    done = build(cache, *source, "--out", folder, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\d{3} records of 5120 bytes", done.stderr) and "about" in done.stderr
    return folder


def test_cached_answers_equal_the_online_teacher_to_the_last_bit(
    train: Train, teacher: Path, short_file: Path, cached: Path, tmp_path: Path
) -> None:
    """The same micro-batch and masks: seed 17 is the cache's own, and two epochs have its two patterns."""
    flags = ["--data", short_file, "--tokenizer", teacher / "hf", "--steps", 60, "--teacher-dtype", "fp32"]
    flags += ["--kd-ratio", 0.9, "--temperature", 2, "--temperature-stop", 1, "--eval-every", 60, "--save-every", 60]
    train(*flags, "--teachers", teacher, "--out", tmp_path / "online")
    train(*flags, "--teachers", f"cache:{cached}", "--out", tmp_path / "cached")

    assert numbers(tmp_path / "online") == numbers(tmp_path / "cached")
    scores = [json.loads((tmp_path / name / "run.json").read_text())["teachers"][0] for name in ("online", "cached")]
    assert scores[0]["eval/loss"] == pytest.approx(scores[1]["eval/loss"], rel=1e-5)
    assert scores[0]["forwards"] == scores[1]["forwards"] == 120
    assert scores[1]["device_bytes"] < 0.1 * scores[0]["device_bytes"]


def test_caches_and_models_in_one_pool_share_masks_and_resume(
    train: Train, teacher: Path, short_file: Path, cached: Path, tmp_path: Path
) -> None:
    flags = ["--data", short_file, "--tokenizer", teacher / "hf", "--teachers", f"cache:{cached}", teacher]
    flags += ["--teacher-dtype", "fp32", "--kd-ratio", 0.9, "--sampler", "round_robin", "--kd-every", 3, "--seed", 5]
    train(*flags, "--out", tmp_path / "whole")
    train(*flags, "--out", tmp_path / "run", "--max-minutes", 0.0001)
    record = read_record(tmp_path / "run")
    for younger in ("draws", "ensemble", "teacher_placement"):  # as if the run were older than these flags
        del record["config"][younger]
    write_record(tmp_path / "run", record)
    train(*flags, "--out", tmp_path / "run", "--resume", "--max-minutes", 10)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    drawn = [line["teacher"] for line in metrics(tmp_path / "whole")]
    assert drawn == [[f"cache:{cached}"], [], [], [str(teacher)], [], [], [f"cache:{cached}"], []]


def test_behind_its_window_a_run_resumes_without_its_teachers(
    train: Train, teacher: Path, short_file: Path, cached: Path, tmp_path: Path
) -> None:
    """The masks stay those of the cache."""
    sources = [shutil.copytree(teacher / "hf", tmp_path / "model"), shutil.copytree(cached, tmp_path / "answers")]
    flags = ["--data", short_file, "--tokenizer", teacher / "hf", "--teachers", sources[0], f"cache:{sources[1]}"]
    flags += ["--teacher-dtype", "fp32", "--kd-ratio", 0.9, "--kd-stop", 0.125, "--seed", 5]
    train(*flags, "--out", tmp_path / "whole")
    train(*flags, "--out", tmp_path / "run", "--max-minutes", 0.0001)
    for source in sources:
        shutil.rmtree(source)
    train(*flags, "--out", tmp_path / "run", "--resume", "--max-minutes", 10)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def test_a_run_refuses_a_cache_of_something_else(
    teacher: Path, short_file: Path, corpus_file: Path, cache: Path, cached: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("KD_CACHE", str(cache))
    flags = [*SMALL, "--tokenizer", teacher / "hf", "--teachers", f"cache:{cached}", "--kd-ratio", 0.9]
    right = ["--data", short_file, "--teacher-dtype", "fp32"]
    for wrong, setting in (
        (["--teacher-dtype", "bf16"], "teacher_dtype"), (["--mask-fraction", 0.3], "mask_fraction"),
        (["--data", corpus_file], "data"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main([*map(str, (*flags, *right, *wrong, "--out", tmp_path / "run"))])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 2 and f"cache:{cached} has {setting} " in line
        assert not (tmp_path / "run").exists()


def test_a_killed_build_continues_on_other_ranks_with_the_same_bytes(
    teacher: Path, short_file: Path, cache: Path, cached: Path, tmp_path: Path
) -> None:
    source = ["--teacher", teacher, "--tokenizer", teacher / "hf", "--data", short_file, "--teacher-dtype", "fp32"]
    words = ["--seq-len", 32, "--mask-patterns", 2, "--micro-batch-size", 4, *source]
    check_killed_build(cached, words, cache, tmp_path / "new")


def test_a_teacher_without_finite_answers_leaves_no_run(train: Train, teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher / "hf", tmp_path / "nan")
    model = BertForMaskedLM.from_pretrained(folder)
    torch.nn.init.constant_(model.cls.predictions.bias, torch.nan)
    model.save_pretrained(folder)
    done = train("--teachers", folder, "--kd-ratio", 0.9, "--out", tmp_path / "run", check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and f"--teachers {folder} answers with no finite numbers" in line
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_per_rank_on_a_sharded_pool_across_a_kill_in_the_window(
    teacher: Path, bad_teacher: Path, corpus_file: Path, cache: Path, tmp_path: Path
) -> None:
    """Killed at step 5, so resumed from the checkpoint on the window's first edge, at step 3."""
    flags = [*SMALL, *EDGES, "--data", corpus_file, "--teachers", teacher, bad_teacher]
    flags += ["--sampler", "per_rank", "--teacher-placement", "sharded", "--kd-ratio-stop", 0.3, "--kd-ramp", "cosine"]
    whole = killed_and_resumed(flags, cache, tmp_path, 5)
    inside = [line["teacher"] for line in metrics(whole) if line["kd_ratio"]]
    assert inside == [[str(teacher), str(bad_teacher)]] * 6, "each rank has a teacher of its own"
    for folder in (whole, tmp_path / "killed5"):
        good, bad = json.loads((folder / "run.json").read_text())["teachers"]
        assert (good["worse_than_chance"], bad["worse_than_chance"]) == (False, True)
        assert good["forwards"] == bad["forwards"] == 6 * 2
    again = warm.ranks(2, [RECIPE, "--out", tmp_path / "killed5", "--resume"])
    assert again.returncode == 0
    assert "has finished" in again.stdout


def test_zero3_teachers_give_what_whole_ones_give(
    teacher: Path, bad_teacher: Path, corpus_file: Path, cache: Path, tmp_path: Path
) -> None:
    os.environ["KD_CACHE"] = str(cache)
    flags = [*SMALL, *EDGES, "--data", corpus_file, "--teachers", teacher, bad_teacher, "--sampler", "weighted"]
    flags += ["--teacher-weights", 2, 1]
    for placement in ("device", "zero3"):
        words = [RECIPE, *flags, "--teacher-placement", placement, "--out", tmp_path / placement]
        done = warm.ranks(2, words, KD_CACHE=str(cache))
        assert done.returncode == 0, done.stderr[-3000:]
    assert trace(tmp_path / "zero3") == trace(tmp_path / "device")
    sizes = {
        placement: [
            one["device_bytes"] for one in json.loads((tmp_path / placement / "run.json").read_text())["teachers"]
        ]
        for placement in ("device", "zero3")
    }
    assert sizes["zero3"][0] == pytest.approx(sizes["device"][0] / 2, rel=0.02)


def test_weights_of_8_bits_answer_nearly_the_same(train: Train, teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    for dtype in ("bf16", "int8"):
        train("--teachers", teacher, "--kd-ratio", 0.9, "--teacher-dtype", dtype, "--out", tmp_path / dtype)
    bf16, int8 = (json.loads((tmp_path / dtype / "run.json").read_text())["teachers"][0] for dtype in ("bf16", "int8"))
    assert int8["device_bytes"] < 0.9 * bf16["device_bytes"]  # all but the embeddings, which are most of this teacher
    assert int8["eval/loss"] != bf16["eval/loss"] == pytest.approx(int8["eval/loss"], rel=0.01)
    losses = ([line["loss"] for line in metrics(tmp_path / dtype)] for dtype in ("bf16", "int8"))
    assert next(losses) == pytest.approx(next(losses), rel=0.01)


SAMPLERS = ("uniform", "weighted", "round_robin", "curriculum", "all")
# Without a GPU, host is device.
GRID = [*itertools.product(SAMPLERS, ("device", "zero3")), ("per_rank", "device"), ("per_rank", "sharded")]
GRID += [("round_robin", "host")]


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "placement"), GRID)
def test_kill_9_at_any_step_for_every_sampler_and_placement(
    sampler: str, placement: str, teacher: Path, bad_teacher: Path, corpus_file: Path, cache: Path, tmp_path: Path
) -> None:
    """Before the window, on both sides of a checkpoint in it, and behind it."""
    flags = [*SMALL, *EDGES, "--data", corpus_file, "--teachers", teacher, bad_teacher]
    flags += ["--sampler", sampler, "--teacher-placement", placement, "--temperature", 2, "--temperature-stop", 1]
    whole = killed_and_resumed(flags, cache, tmp_path, 2, 4, 7, 10)
    assert sum(line["kd_ratio"] > 0 for line in metrics(whole)) == 6
