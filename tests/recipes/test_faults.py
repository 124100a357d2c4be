"""Runs that would go on, vanish or read themselves against the user's will."""

import errno
import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors import SafetensorError
from tensorboard.summary.writer.record_writer import RecordWriter

from kd_core import cli
from kd_core.glue import plan
from kd_core.runs import jobs
from kd_core.runs.folders import read_record, write_record
from kd_core.runs.record import Lines
from kd_core.system import files
from kd_core.text import documents
from kd_core.text.c4 import Shards
from kd_core.training import checkpoints
from kd_core.training.engine import LoopError
from recipes.bert_kd import main
from tests.conftest import ROOT, cpu_environment, free_port
from tests.recipes.conftest import RECIPE, SMALL, Attempt, metrics, start, trace, wait_for_step

Train = Callable[..., subprocess.CompletedProcess[str]]
LONG = [*SMALL, "--steps", "100000", "--save-every", "100000", "--eval-every", "100000"]


@pytest.fixture
def attempt(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Attempt:
    monkeypatch.chdir(tmp_path)
    return Attempt(main, [*SMALL, "--data", corpus_file], tmp_path, capsys)


DEEPSPEED = ("deepspeed.launcher.runner", "-q", "--num_gpus", 2)
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", 2)


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        *((DEEPSPEED, number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)),
        pytest.param(TORCHRUN, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_ranks_save_and_end_when_their_launcher_is_gone(
    launcher: tuple[object, ...], number: int, corpus_file: Path, cache: Path, tmp_path: Path
) -> None:
    """DeepSpeed's runner passes no signal on, on one node."""
    out = tmp_path / "run"
    words = ["-m", *launcher, "--master_port", free_port()]
    process = start(cache, sys.executable, *words, RECIPE, *LONG, "--data", corpus_file, "--out", out)
    wait_for_step(out, 3, process)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if child.is_running()]
    process.send_signal(number)
    process.wait(120)
    _, alive = psutil.wait_procs(ranks, timeout=120)
    assert not alive
    result = json.loads((out / "run.json").read_text())["result"]
    assert result["stopped"] in ("launcher-gone", "SIGTERM", "SIGINT")
    assert result["step"] == metrics(out)[-1]["step"]
    assert [path.name for path in (out / "checkpoints").glob("step*")] == [f"step{result['step']:08d}"]


def test_a_closed_terminal_has_the_run_save(corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(cache, sys.executable, RECIPE, *LONG, "--data", corpus_file, "--out", out)
    wait_for_step(out, 3, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0
    assert json.loads((out / "run.json").read_text())["result"]["stopped"] == "SIGHUP"


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(
    train: Train, corpus_file: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = start(cache, sys.executable, RECIPE, *LONG, "--data", corpus_file, "--out", out)
    wait_for_step(out, 3, first)
    again = ["--steps", 100000, "--save-every", 100000, "--eval-every", 100000, "--out", out, "--resume"]
    second = train(*again, check=False)
    assert second.returncode == 2
    said = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert said == [
        f"error: --out {out} is in use by process {first.pid} on {os.uname().nodename}; wait for its end, stop it, or "
        "choose another folder"
    ]
    lines = len(metrics(out))
    first.send_signal(signal.SIGKILL)  # the kernel frees the lock
    first.wait()
    assert len(metrics(out)) >= lines
    assert train(*again, "--max-minutes", 0.01).returncode == 0


def test_a_lock_that_was_removed_is_made_anew_and_another_s_is_not_taken(tmp_path: Path) -> None:
    lock = tmp_path / "checkpoints" / ".lock"
    files.hold(lock, "x")
    lock.unlink()
    files.hold(lock, "x")
    assert lock.read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
    lock.unlink()
    read, write = os.pipe()
    if not (other := os.fork()):  # holds none of its parent's
        files.hold(lock, "x")
        os.write(write, b"held")
        signal.pause()
    os.read(read, 4)
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "checkpoints")
    for path in (lock, linked / ".lock"):
        with pytest.raises(files.InUse, match=f"x is in use by process {other} on "):
            files.hold(path, "x", 0)
    os.kill(other, signal.SIGKILL)
    with pytest.MonkeyPatch.context() as patch:  # defunct, as nobody has waited for it yet
        patch.setattr(files.socket, "gethostname", lambda: "another host")
        files.hold(linked / ".lock", "x")
    assert lock.read_text() == f"process {os.getpid()} on another host\n"
    os.waitpid(other, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", ""], "--out is blank; give a value, or leave the flag out"),
        (["--out= "], "--out is blank"),
        (["--data", ""], "--data is blank"),
        (["--teachers", "a", "", "--kd-ratio", "0.5"], "--teachers is blank"),
        (["--student", " "], "--student is blank"),
        (["--deepspeed-config", ""], "--deepspeed-config is blank"),
    ],
)
def test_a_blank_value_is_no_folder(attempt: Attempt, words: list[str], message: str, tmp_path: Path) -> None:
    """An unset variable of a shell; as a folder it would be the current one, with the user's own files in it."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    assert message in attempt(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"


def test_the_home_folder_is_meant_by_its_sign(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for words in (["--data=~/x.txt"], ["--teachers", "cache:~/x", "--kd-ratio", "0.5"]):
        assert str(tmp_path / "home" / "x") in attempt(*words)


def test_what_a_user_keeps_beside_the_checkpoints_stays(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train("--out", out, "--steps", 12, "--max-minutes", 60)
    mine = ["step00000012_backup", "stepping", "step1"]
    for name in mine:
        shutil.copytree(out / "checkpoints" / "step00000012", out / "checkpoints" / name)
    shutil.rmtree(out / "checkpoints" / "step00000012")
    record = read_record(out)
    del record["result"]
    write_record(out, record)
    done = train("--out", out, "--steps", 12, "--resume")  # from the other one that is kept
    assert ", from step " in done.stderr
    assert sorted(path.name for path in (out / "checkpoints").glob("step*") if path.name in mine) == sorted(mine)


class Saves:
    """Of an engine what a checkpoint asks for."""

    module = torch.nn.Linear(1, 1)

    def save_checkpoint(self, folder: str, tag: str, **_: object) -> None:
        Path(folder, tag, "engine.pt").write_text(tag)


def test_a_checkpoint_beside_what_a_user_has_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.dist, "barrier", lambda: None)
    folder, moved = tmp_path / "checkpoints", tmp_path / "another disk" / "1"
    mine = [
        "step00000001 (copy)", "step00000001_backup", "step00000001.tar", "step00000099", "step00000003", "latest.bak",
        ".nfs0001", ".step00000001.swp", "step00000001\nx", "step", "step1",
    ]  # fmt: skip
    for name in mine:
        (folder / name).mkdir(parents=True)
        (folder / name / "notes").touch()
    for step in (1, 2):
        checkpoints.save(folder, step, {"student": Saves()}, {}, 1)
        if step == 1:
            moved.parent.mkdir()
            shutil.move(folder / "step00000001", moved)
            (folder / "step00000001").symlink_to(moved)
    assert (moved / "manifest.json").exists(), "what a link names is the user's"
    checkpoints.save(folder, 3, {"student": Saves()}, {}, 1)
    checkpoints.save(folder, 3, {"student": Saves()}, {}, 1)
    there = {path.name for path in folder.iterdir()}
    assert there == {*mine, "step00000003", "step00000003.kept"}
    assert all((folder / name / "notes").exists() for name in there - {"step00000003"})
    assert checkpoints.step_of("step00000003") == 3 and (folder / "step00000003" / "engine.pt").exists()


def test_an_export_to_a_link_is_one_to_the_folder_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "hf").symlink_to(tmp_path / "another disk")
    for text in ("first", "second"):
        files.replace_folder(tmp_path / "hf", lambda hidden, text=text: (hidden / "model").write_text(text))
    assert (tmp_path / "hf").is_symlink() and (tmp_path / "another disk" / "model").read_text() == "second"


def test_copies_beside_a_model_s_weights_are_not_its_weights(tmp_path: Path) -> None:
    names = ("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin")
    digests = []
    for name in names:
        (tmp_path / name).write_text(name)
        digests.append(plan.weights_digest(str(tmp_path)))
    assert len(set(digests)) == len(names)
    for name in ("model (copy).safetensors", "._model.safetensors", "model.safetensors.bak", "training_args.bin"):
        (tmp_path / name).write_text(name)
    assert plan.weights_digest(str(tmp_path)) == digests[-1]


def test_data_is_what_a_user_would_call_so(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.txt", ".ipynb_checkpoints/a.txt", ".hidden.txt", "run/hf/vocab.txt", "run/log.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "run" / "run.json").write_text('{"recipe": "bert_kd", "config": {}}')
    (tmp_path / "elsewhere").mkdir()
    data = tmp_path / "data"
    data.mkdir()
    (data / "c.txt").write_text("text")
    (data / "linked").symlink_to(tmp_path / "sub")
    (data / "up").symlink_to(data)
    (data / "again").symlink_to(data)
    listing = files.files_below(data)
    assert listing.names == ["c.txt", "linked/b.txt"]
    assert str(listing) == "left out 2 taken already by another name (again, up)"
    found = [str(path.relative_to(tmp_path)) for _, path in documents.find_files(tmp_path)]
    assert found == ["a.txt", "data/c.txt", "sub/b.txt"], "a run's own files, hidden ones, or a folder twice"


def test_a_folder_that_cannot_be_synchronised_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFS, FUSE."""

    def refuse(_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", refuse)
    files.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync(tmp_path / "file")


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    files.hold(tmp_path / "x" / ".lock", "--out x")
    monkeypatch.setattr(jobs.fcntl, "flock", refuse)
    with jobs.locked(tmp_path):
        pass
    files.build_once(tmp_path / "cache" / "new", lambda new: (new / "built").touch())
    assert (tmp_path / "cache" / "new" / "built").exists()
    said = capsys.readouterr().err.splitlines()
    shards: Any = Shards(tmp_path, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="set KD_CACHE to a folder of this machine"), shards._lock(0):
        pass
    assert len(said) == 3
    for line in said:
        assert "cannot be locked (No locks available): make sure that nothing else writes there" in line


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    code = f"import time; from pathlib import Path; from kd_core.system import files; files.hold(Path({str(lock)!r}), 'x'); print(1, flush=True); time.sleep(60)"
    env = cpu_environment(PYTHONPATH=str(ROOT))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as other:
        assert other.stdout and other.stdout.readline() == b"1\n"
        began = time.monotonic()
        with pytest.raises(files.InUse, match=f"x is in use by process {other.pid} on"):
            files.hold(lock, "x")
        assert time.monotonic() > began + files.SECONDS_TO_DIE
        other.kill()
    files.hold(lock, "x")


PRINTS = """
import os, sys
from kd_core.launch import outlive_readers
outlive_readers()
name = sys.argv[1]
for _ in range(3):
    print("a line", flush=True)
    print("a line", file=sys.stderr, flush=True)
with open(name, "w") as file:
    assert file.fileno() > 2, "a file in the place of the terminal"
    file.write("done")
"""


@pytest.mark.parametrize("sink", [">&-", "2>&-", "<&- >&- 2>&-", "2>&1 | true", ">/dev/full 2>&1"])
def test_output_that_nobody_reads_is_no_error(sink: str, tmp_path: Path) -> None:
    """Standard output closed, as by cron or a daemon; a pipe whose reader has ended; a log on a full disk."""
    command = f'sleep 0; "$0" -c "$1" "$2" {sink}; exit ${{PIPESTATUS[0]}}'
    words = ["bash", "-c", command, sys.executable, PRINTS, str(tmp_path / "file")]
    done = subprocess.run(words, env=cpu_environment(PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, text=True)
    assert (done.returncode, (tmp_path / "file").read_text()) == (0, "done"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("form", ["python", "deepspeed", "bash"])
def test_ctrl_c_saves_where_tee_has_ended_before(form: str, corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the terminal's group, the reader of the output too."""
    out = tmp_path / "run"
    command = {
        "python": [sys.executable, RECIPE],
        "deepspeed": [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus",
            2,
            "--master_port",
            free_port(),
            RECIPE,
        ],
        "bash": ["bash", ROOT / "launch" / "bert_kd.sh", "--kd-ratio", 0],
    }[form]
    words = shlex.join(map(str, [*command, *LONG, "--data", corpus_file, "--out", out]))
    process = start(cache, "bash", "-c", f"{words} 2>&1 | tee {tmp_path}/log")
    wait_for_step(out, 3, process)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    deadline = time.monotonic() + 60
    while "result" not in (record := json.loads((out / "run.json").read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert record["result"]["stopped"] in ("SIGINT", "SIGTERM")
    assert (out / "checkpoints" / f"step{record['result']['step']:08d}").exists()


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, FULL), f"{FULL}: about 3 MB needed, 1.5 GB free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded: about 3 MB needed, 1.5 GB free"),
        (SafetensorError(f"I/O error: {FULL} (os error 28)"), f"{FULL}: about 3 MB needed, 1.5 GB free"),
        (OSError("201184 requested and 26624 written"), "201184 requested and 26624 written"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"), "[enforce fail at inline"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ],
)
def test_whatever_cannot_be_written_says_where_how_much_and_what_to_do(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_free", lambda _: (1_500_000_000, True))
    with pytest.raises(files.Unwritable) as end, files.writing(tmp_path / "x", needs=3_000_000):
        raise error
    assert str(end.value).startswith(f"{tmp_path / 'x'} cannot be written ({reason}")
    assert str(end.value).endswith("); make room there, then continue with --resume")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 64 MiB, in memory."""
    (tmp_path / "disk").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", tmp_path / "disk"], capture_output=True)
    if done.returncode:
        pytest.skip("this user may mount nothing")
    yield tmp_path / "disk"
    subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_a_cache_on_a_full_disk_leaves_nothing_there(small_disk: Path) -> None:
    with pytest.raises(files.Unwritable, match=f"{FULL}: more than 67.1 MB needed") as end:
        files.build_once(small_disk / "cache" / "x", lambda new: np.save(new / "x", np.zeros(10**7)))
    assert end.value.errno == errno.ENOSPC
    assert not list((small_disk / "cache").iterdir())


def test_a_disk_that_takes_no_more_files_says_so(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,nr_inodes=10", small_disk], check=True)
    with (
        pytest.raises(files.Unwritable, match=f"{FULL}: no file more, as no inode is free"),
        files.writing(small_disk / "x"),
    ):
        for number in range(10):
            (small_disk / str(number)).touch()


@pytest.mark.slow
def test_a_disk_that_is_really_full_is_one_line_and_the_run_goes_on_once_there_is_room(
    train: Train, small_disk: Path, tmp_path: Path
) -> None:
    train("--out", tmp_path / "whole")
    out = small_disk / "run"
    train("--out", out, "--max-minutes", 0.0001)
    (good,) = (out / "checkpoints").glob("step*")
    needed = files.folder_bytes(good)
    for left, path, asked in (
        (needed // 2, out / "checkpoints" / "step00000003", f"about {files.shown_bytes(needed)} needed"),
        (0, out / "run.json", "needed"),
    ):
        with (small_disk / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(small_disk).free - left)
        full = train("--out", out, "--resume", "--max-minutes", 10, check=False)
        errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
        assert full.returncode == 1 and "Traceback" not in full.stderr
        assert errors == [line for line in errors if str(path) in line and FULL in line and asked in line] != [], (
            full.stderr
        )
        assert len(errors) == 1 and "make room there" in errors[0]
        assert list((out / "checkpoints").glob("step*")) == [good]
        (small_disk / "filler").unlink()
    train("--out", out, "--resume", "--max-minutes", 10)
    assert trace(out) == trace(tmp_path / "whole")


@pytest.mark.parametrize(
    "error",
    [LoopError("a mistake"), FileNotFoundError(2, "No such file", "/data/x"), PermissionError(13, "", "/data/x")],
)
def test_what_is_no_fault_of_the_disk_stays_what_it_is(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as end, files.writing(tmp_path / "x"):
        raise error
    assert end.value is error


def test_a_library_s_full_disk_names_no_path_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KD_CACHE", "/proc")  # which has no room at all
    with pytest.raises(SystemExit) as end, cli.one_line_errors():
        raise OSError(errno.ENOSPC, FULL)
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: [Errno 28] {FULL}; full: /proc; make room there and call again\n"


def test_tensorboard_s_thread_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    lines = Lines(tmp_path, "w")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(RecordWriter, "write", refuse)
    with pytest.raises(files.Unwritable, match=f"{tmp_path}/tensorboard cannot be written .{FULL}: more than"):
        for step in range(10000):
            lines.write({"step": step, "loss": 1.0})
    assert "Traceback" not in capsys.readouterr().err


def test_what_a_user_keeps_in_an_export_or_a_job_s_folder_stays(tmp_path: Path) -> None:
    for text in ("first", "second"):
        files.replace_folder(tmp_path / "best", lambda hidden, text=text: (hidden / "model").write_text(text))
        (tmp_path / "best" / "notes.txt").write_text("mine")
        (tmp_path / "best" / "mine").mkdir(exist_ok=True)
    assert (tmp_path / "best" / "model").read_text() == "second"
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["mine", "model", "notes.txt"]
    job = jobs.Job("kd", tmp_path / "best", [sys.executable, "-c", ""], 1, (), True)
    with pytest.raises(ValueError, match="best holds mine, which no run has made; move it, or choose another --out"):
        jobs.start(job, dict(os.environ), 0)
    assert (tmp_path / "best" / "notes.txt").exists()


def test_a_closed_terminal_before_the_first_step_leaves_nothing_half_made(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end, cli.one_line_errors() as undo:
        undo.callback((tmp_path / "undone").touch)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(5)
    assert end.value.code == 128 + signal.SIGHUP
    assert (tmp_path / "undone").exists()


def test_without_a_home_folder_no_folder_is_called_by_its_sign(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for path in ("~/x", "~nobody-of-this-name/x"):
        told = f"--data {path}: the home folder is not known here; give the whole path, or set HOME"
        assert told in attempt(f"--data={path}")
    monkeypatch.delenv("KD_CACHE", raising=False)
    assert files.cache_root() == Path(tempfile.gettempdir(), f"kd_recipes-{os.getuid()}")
