"""Every mistake a user can make: one line that names it, exit code 2, no traceback, no half-made run folder."""

import gzip
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from kd_core.runs.folders import read_record, write_record
from recipes.bert_kd import main
from tests.recipes.conftest import SMALL, Attempt


@pytest.fixture
def attempt(
    tmp_path: Path, corpus_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Attempt:
    monkeypatch.setenv("KD_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return Attempt(main, [*SMALL, "--data", corpus_file], tmp_path, capsys)


def test_flags(attempt: Attempt) -> None:
    assert "did you mean --kd-ratio?" in attempt("--kd-ratoi", 1)
    assert "--kd-stop must be at least --kd-start" in attempt("--kd-start", 0.5, "--kd-stop", 0.1)
    assert "--kd-stop must be in [0, 1], got 1.5" in attempt("--kd-stop", 1.5)
    assert "--temperature must be a finite number above 0, got 0.0" in attempt("--temperature", 0)
    assert "--temperature must be a finite number above 0, got nan" in attempt("--temperature", "nan")
    assert "--kd-ratio must be 0 without --teachers" in attempt("--kd-ratio", 0.5)
    assert "--global-batch-size 6 must be a multiple of --micro-batch-size 4" in attempt("--global-batch-size", 6)
    assert "--mask-fraction must be in (0, 1)" in attempt("--mask-fraction", 0)
    assert "--mask-fraction must be in (0, 1)" in attempt("--mask-fraction", 0.01)
    assert "--student must be LAYERSxWIDTH with a width that 64 divides" in attempt("--student", "2x100")


def test_flags_of_the_pool(attempt: Attempt, teacher: Path, tmp_path: Path) -> None:
    kd = ("--kd-ratio", 0.5, "--teachers", teacher, teacher)
    assert "--teacher-placement must be used with --sampler per_rank" in attempt(*kd, "--teacher-placement", "sharded")
    zero3 = attempt(*kd, "--sampler", "per_rank", "--teacher-placement", "zero3")
    assert "--sampler must be one that all ranks share" in zero3
    assert "--draws must be at most" in attempt(*kd, "--draws", 3)
    assert "--teacher-weights must be one a teacher, 2" in attempt(*kd, "--sampler", "weighted", "--teacher-weights", 1)
    assert "--teacher-weights must be given to weighted" in attempt(*kd, "--teacher-weights", 1, 1)
    assert "--kd-every must be at least 1" in attempt(*kd, "--kd-every", 0)
    assert "--kd-ratio-stop must be in [0, 1]" in attempt(*kd, "--kd-ratio-stop", 2)
    assert "--temperature-stop must be a finite number above 0" in attempt(*kd, "--temperature-stop", 0)
    assert "--softmax-axis must be class" in attempt(*kd, "--divergence", "mse", "--softmax-axis", "sequence")
    assert f"--teachers {tmp_path}/run* matches nothing" in attempt("--kd-ratio", 0.5, "--teachers", f"{tmp_path}/run*")
    cached = ("--kd-ratio", 0.5, "--teachers", f"cache:{tmp_path}/nowhere")
    assert "no cache there; make one by python -m kd_core.cache build" in attempt(*cached)
    assert "--teacher-placement must be device for teachers that are no models" in attempt(
        *cached, "--teacher-placement", "host"
    )


def test_data(attempt: Attempt, tmp_path: Path, corpus_file: Path) -> None:
    assert "--data" in attempt("--data", "./nowhere.txt")
    folder = tmp_path / "texts"
    folder.mkdir()
    assert str(folder) in attempt("--data", folder)
    shutil.copy(corpus_file, folder / "good.txt")
    (folder / "empty.txt").write_text("")
    with gzip.open(folder / "cut.txt.gz", "wt") as stream:
        stream.write(corpus_file.read_text())
    whole = (folder / "cut.txt.gz").read_bytes()
    (folder / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut.txt.gz" in attempt("--data", folder)
    (folder / "cut.txt.gz").unlink()
    (folder / "latin.txt").write_bytes("caf\xe9 and more text".encode("latin-1"))
    message = attempt("--data", folder)
    assert "latin.txt" in message and "UTF-8" in message
    short = tmp_path / "short.txt"
    short.write_text("\n\n".join(f"document {i} has a few words in it" for i in range(200)))
    message = attempt("--data", short, "--global-batch-size", 4000, "--micro-batch-size", 4000, "--vocab-size", 200)
    assert "--global-batch-size" in message and "4000" in message
    one = tmp_path / "one.txt"
    one.write_text("\n".join(line for line in corpus_file.read_text().splitlines() if line.strip()))
    assert "validation" in attempt("--data", one)


def test_teachers(attempt: Attempt, tmp_path: Path, teacher: Path, train: Any) -> None:
    kd = ("--kd-ratio", 0.5, "--teachers")
    assert "./nowhere" in attempt(*kd, "./nowhere")
    (tmp_path / "empty").mkdir()
    assert "is no model" in attempt(*kd, tmp_path / "empty")
    broken = tmp_path / "broken"
    shutil.copytree(teacher / "hf", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{broken} cannot be loaded" in attempt(*kd, broken)
    harmful = tmp_path / "harmful"
    shutil.copytree(teacher / "hf", harmful)
    (harmful / "model.safetensors").unlink()
    (harmful / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(str(tmp_path / "was_run"))))
    assert f"{harmful} cannot be loaded" in attempt(*kd, harmful)
    assert not (tmp_path / "was_run").exists()
    for number, config in enumerate(("[]", "null", '{"model_type": "bert", "hidden_size": "x"}')):
        folder = shutil.copytree(teacher / "hf", tmp_path / f"config{number}")
        (folder / "config.json").write_text(config)
        assert f"--teachers {folder} " in attempt(*kd, folder)
    other = attempt(*kd, teacher, "--vocab-size", 400)
    assert str(teacher) in other and "another tokenizer" in other
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    assert "has not finished" in attempt(*kd, unfinished)


class Harmful:
    """Unpickling this makes a file: what a weight file from a stranger could do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def test_deepspeed_config(attempt: Attempt, tmp_path: Path) -> None:
    def config(content: Any) -> Path:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    assert "zero2_bf16.json" in attempt("--deepspeed-config", "nowhere.json")
    assert "not valid JSON" in attempt("--deepspeed-config", config("{"))
    assert "unknown keys ['zero_optimisation']" in attempt("--deepspeed-config", config({"zero_optimisation": {}}))
    assert "zero_optimization.stag" in attempt("--deepspeed-config", config({"zero_optimization": {"stag": 1}}))
    assert '"auto"' in attempt("--deepspeed-config", config({"bf16": {"enabled": "auto"}}))
    assert "--lr" in attempt("--deepspeed-config", config({"optimizer": {"type": "Adam"}}))
    assert "--micro-batch-size" in attempt("--deepspeed-config", config({"train_micro_batch_size_per_gpu": 1}))


def test_out_and_resume(attempt: Attempt, tmp_path: Path, teacher: Path) -> None:
    assert "holds a run; add --resume" in attempt("--out", teacher)
    assert "holds no run" in attempt("--out", tmp_path / "new", "--resume")
    stopped = tmp_path / "stopped"
    shutil.copytree(teacher, stopped)
    record = read_record(stopped)
    record["result"]["stopped"] = "SIGTERM"
    write_record(stopped, record)
    message = attempt("--out", stopped, "--resume", "--steps", 4, "--student", "small")
    assert "--student was 'mini' and is now 'small'" in message
    assert (stopped / "hf").exists(), "a refused resume must not touch the run"


def test_a_disk_that_cannot_be_written(attempt: Attempt) -> None:
    message = attempt("--out", "/proc/run")
    assert "--out /proc/run cannot be written" in message
