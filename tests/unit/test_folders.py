"""What a resumed run and others are told of a run folder that is not what it was."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_core.runs import folders, sources
from kd_core.system import files
from kd_core.system.checked import DamagedError
from kd_core.system.files import InUse
from kd_core.teachers.flags import DistillFlags
from kd_core.text.flags import TextFlags
from kd_core.training.flags import TrainFlags


@dataclasses.dataclass(frozen=True)
class Config(DistillFlags, TrainFlags, TextFlags):
    """As bert_kd's."""

    student: str = "tiny"


BEFORE: dict[str, Any] = {
    "out": "x", "resume": True, "data": "a.txt", "tokenizer": "t.json", "teachers": ("one", "two"), "kd_ratio": 0.5,
    "deepspeed_config": "a.json", "student": "runs/1",
}  # fmt: skip
KNOWN = {
    "data": "0123", "teachers": [{"fingerprint": "4"}, {"fingerprint": "5"}], "deepspeed": {}, "models": {"student": "6"},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record = folders.describe("r", Config(**BEFORE))
    folders.write_record(tmp_path, record | KNOWN)
    return tmp_path


def resumed(run: Path, **changed: Any) -> dict[str, Any]:
    return folders.check_folder(dataclasses.replace(Config(**BEFORE), out=str(run), **changed))


def test_what_was_moved_is_told_by_its_content(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = {"data": "b.txt", "tokenizer": "u.json", "teachers": ("three", "four"), "deepspeed_config": "b.json"}
    moved["student"] = "moved/1"
    assert resumed(run, **moved)["data"] == "0123"
    with contextlib.ExitStack() as undo:
        folders.claim_folder(dataclasses.replace(Config(**BEFORE), out=str(run), **moved), "r", undo)
    files.let_go(folders.lock_of(run))
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == len(moved) and "--student was runs/1 and is now moved/1: taken if its content is the same" in said
    )
    cfg = dataclasses.replace(Config(**BEFORE), out=str(run), data="b.txt")
    folders.check_data(cfg, "0123")
    with pytest.raises(ValueError, match="--data does not hold what the run began with"):
        folders.check_data(cfg, "4567")
    with pytest.raises(ValueError, match="--lr was"):
        resumed(run, lr=1.0)


@pytest.mark.parametrize(
    ("known", "changed"),
    [
        ({"data": None}, {"data": "b.txt"}),
        ({"teachers": []}, {"teachers": ("three", "four")}),
        ({"teachers": [{"fingerprint": "4"}, {}]}, {"teachers": ("three", "four")}),
        ({}, {"teachers": ("three",)}),
        ({"deepspeed": None}, {"deepspeed_config": "b.json"}),
        ({"models": {"judge": "6"}}, {"student": "moved/1"}),
        ({"models": None}, {"student": "moved/1"}),
    ],
)
def test_what_cannot_be_told_by_its_content_keeps_its_name(
    run: Path, known: dict[str, Any], changed: dict[str, Any]
) -> None:
    """A run that was killed before it knew, or of an earlier version."""
    folders.write_record(run, folders.read_record(run) | known)
    with pytest.raises(ValueError, match=f"--{next(iter(changed)).replace('_', '-')} was .* and is now"):
        resumed(run, **changed)


def test_a_deepspeed_config_is_what_it_says_and_not_its_name(run: Path) -> None:
    began = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    folders.write_record(run, folders.read_record(run) | {"deepspeed": began})
    cfg = dataclasses.replace(Config(**BEFORE), out=str(run), deepspeed_config="b.json")
    folders.check_deepspeed(cfg, "deepspeed_config", dict(reversed(began.items())))
    for other in (began | {"zero_optimization": {"stage": 2}}, began | {"aio": {}}, {"bf16": {"enabled": True}}):
        with pytest.raises(
            ValueError, match=r"--deepspeed-config b\.json has (zero_optimization|aio) .* the run began with"
        ):
            folders.check_deepspeed(cfg, "deepspeed_config", other)
    folders.check_deepspeed(dataclasses.replace(cfg, resume=False), "deepspeed_config", {})
    folders.write_record(run, folders.read_record(run) | {"teacher_deepspeed": began})
    with pytest.raises(
        ValueError, match=r"--teacher-deepspeed-config teacher_zero3_bf16\.json has bf16 null, the run began"
    ):
        folders.check_deepspeed(cfg, "teacher_deepspeed_config", {})


@pytest.mark.parametrize(
    "record",
    ['{"recipe": "r", "config": {}}', '{"recipe": "r", "config": [], "world_size": 1}', "", "[]", "\0",
     '{"recipe": "r", "config": {}, "world_size": 1, "result": "x"}'],
)  # fmt: skip
def test_a_damaged_run_json_is_named_on_resume(record: str, run: Path) -> None:
    (run / "run.json").write_text(record)
    with pytest.raises(DamagedError, match=r"run\.json is damaged"):
        resumed(run)


def test_other_threads_and_versions_are_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = folders.read_record(run)
    folders.say_changes(record)
    assert not capsys.readouterr().err
    now, record["threads"] = torch.get_num_threads(), 64
    record["versions"]["torch"] = "2.0"
    record["hardware"]["name"] = "Z80"
    folders.say_changes(record)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"threads {now} (was 64)" in said and "(was 2.0)" in said and "(was Z80)" in said and "last digits" in said
    folders.say_changes({"recipe": "of an earlier version"})
    assert not capsys.readouterr().err


# --- finished runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(run: Path) -> Path:
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    (run / "hf" / "model.safetensors").write_bytes(b"weights")
    folders.write_record(run, folders.read_record(run) | {"result": {"step": 2}, "files": folders.digests(run)})
    sources._check_exported.cache_clear()
    return run


def test_a_finished_run_is_read_and_a_teacher(finished: Path) -> None:
    assert folders.read_run(finished)[1] == [{"step": 1}, {"step": 2}]
    assert sources.model_source(str(finished)) == str(finished / "hf")


def test_a_model_is_known_by_its_config_and_weights_wherever_it_lies(finished: Path, tmp_path: Path) -> None:
    known = sources.fingerprint(str(finished / "hf"))
    copy = shutil.copytree(finished / "hf", tmp_path / "moved")
    (copy / "README.md").touch()
    assert known and sources.fingerprint(str(copy)) == known
    seen = {known}
    for name in ("config.json", "model.safetensors", "model-00002.safetensors"):
        (copy / name).write_bytes(b"other")
        seen.add(sources.fingerprint(str(copy)))
    assert len(seen) == 4
    assert sources.fingerprint("google-bert/bert-base-uncased") is None


@pytest.mark.parametrize(
    "text", ['{"step": 1}\n', '{"step": 1}\n{"step": 2}', '{"step": 1}\n\0\0\n{"step": 2}\n', "", None]
)
@pytest.mark.parametrize("known", [True, False])
def test_lines_that_were_cut_are_not_reported_on(text: str | None, known: bool, finished: Path) -> None:
    if not known:  # of an earlier version
        record = folders.read_record(finished)
        folders.write_record(finished, {name: record[name] for name in record if name != "files"})
    if text is None:
        (finished / "metrics.jsonl").unlink()
    else:
        (finished / "metrics.jsonl").write_text(text)
    with pytest.raises((DamagedError, FileNotFoundError), match=r"metrics\.jsonl"):
        folders.read_run(finished)


def test_a_log_whose_beginning_was_lost_is_not_reported_on(finished: Path) -> None:
    """A run may go on without its log; what it says of the way there would be wrong."""
    (finished / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\n')
    record = folders.read_record(finished) | {"result": {"step": 5}, "files": folders.digests(finished)}
    for log_every, eval_every, ok in ((1, 4, True), (50, 1, True), (1, 3, False), (3, 1, False)):
        record["config"] |= {"log_every": log_every, "eval_every": eval_every}
        folders.write_record(finished, record)
        if ok:
            assert len(folders.read_run(finished)[1]) == 2
        else:
            with pytest.raises(DamagedError, match=r"metrics\.jsonl is damaged \(its first line is that of step 4"):
                folders.read_run(finished)


@pytest.mark.parametrize("name", ["hf/model.safetensors", "hf/config.json"])
@pytest.mark.parametrize("part", ["", "hf"])
def test_a_teacher_whose_files_have_changed_is_refused_by_name(name: str, part: str, finished: Path) -> None:
    (finished / name).write_bytes(b"weightz")
    with pytest.raises(DamagedError, match=f"{name} is damaged"):
        sources.model_source(str(finished / part))


def test_a_model_elsewhere_is_taken_as_it_is(finished: Path, tmp_path: Path) -> None:
    copy = (finished / "hf").rename(tmp_path / "mine")
    (copy / "model.safetensors").write_bytes(b"other weights")
    assert sources.model_source(str(copy)) == str(copy)
    (finished / "run.json").write_text(json.dumps({"recipe": "of an earlier version"}))
    copy.rename(finished / "hf")
    assert sources.model_source(str(finished)) == str(finished / "hf")


def test_of_two_runs_that_begin_in_a_folder_at_once_one_is_refused_and_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = Config(out=str(tmp_path / "run"))
    read, write = os.pipe()
    if not (other := os.fork()):
        folders.claim_folder(cfg, "r", contextlib.ExitStack())
        os.write(write, b"claimed")
        signal.pause()
    os.read(read, 7)
    monkeypatch.setattr(folders, "check_folder", lambda _: {})  # as it was a moment ago
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(InUse, match=f"run is in use by process {other} on "), contextlib.ExitStack() as undo:
        folders.claim_folder(cfg, "r", undo)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    with pytest.raises(ValueError, match="run holds a run by now"), contextlib.ExitStack() as undo:
        folders.claim_folder(cfg, "r", undo)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_run_that_does_not_begin_leaves_an_empty_folder_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "killed" / "checkpoints").mkdir(parents=True)
    (tmp_path / "killed" / "checkpoints" / ".lock").touch()
    for out in ("new/run", "empty", "killed"):
        with contextlib.ExitStack() as undo:
            folder = folders.claim_folder(Config(out=str(tmp_path / out)), "r", undo)
            assert (folder / "run.json").exists()
            files.let_go(folders.lock_of(folder))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["empty", "killed", "new"]


def test_what_editors_and_file_systems_hide_in_an_export_is_none_of_a_run_s_files(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "hf/model.safetensors", "hf/.nfs0001", "hf/.git/config", "best/.notes.swp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(folders.digests(tmp_path)) == ["hf/model.safetensors", "metrics.jsonl"]
