"""Launch files in every form they can be called in, what signals do to a run, and the set-up before it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kd_core import launch as supervisor

ROOT = Path(__file__).resolve().parents[2]
POLYGLOT = re.search(r'^"eval" .*$', (ROOT / "launch/bert_kd.sh").read_text(), re.MULTILINE)
assert POLYGLOT, "launch/bert_kd.sh has lost the line that makes it a shell script"

# A recipe without torch: says what it was given, then exits with --exit or, with --wait, when it is told to stop.
SCRIPT = f"""#!/usr/bin/env bash
{POLYGLOT[0]}
import json, os, signal, sys, time
from pathlib import Path
from kd_core.launch import die_with_parent

def note(name, what):
    path = Path(__file__).with_name(name + os.environ["RANK"])
    path.with_suffix(".tmp").write_text(json.dumps(what))
    path.with_suffix(".tmp").rename(path)

if __name__ == "__main__":
    die_with_parent()
    signals = []
    signal.signal(signal.SIGTERM, lambda signum, frame: signals.append(signum))
    signal.signal(signal.SIGINT, lambda signum, frame: signals.append(signum))
    keys = ["WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS"]
    note("started", dict(argv=sys.argv[1:], pid=os.getpid(), ppid=os.getppid(), **{{k: os.environ[k] for k in keys}}))
    if sys.argv[-2] == "--exit":
        sys.exit(int(sys.argv[-1]))
    while not signals:
        time.sleep(0.05)
    time.sleep(1)  # saving takes a while
    note("saved", signals)
"""


def wait_for(condition: Callable[[], object], seconds: float = 120) -> float:
    """Seconds until the condition held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - start


class Launch:
    """A folder with a launch file, and the runs started from it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.script = folder / "run.sh"
        folder.mkdir()
        self.script.write_text(SCRIPT)
        self.script.chmod(0o755)
        (folder / "env.sh").write_text(f'exec bash "{ROOT}/launch/env.sh" "$@"\n')

    def start(self, command: str, ranks: int = 1) -> subprocess.Popen[bytes]:
        env = dict(os.environ, NUM_GPUS=str(ranks), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        env["PYTHONPATH"] = str(ROOT)
        return subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=self.folder.parent, env=env)

    def start_waiting(self, ranks: int = 2) -> subprocess.Popen[bytes]:
        run = self.start(f"bash '{self.folder.name}/run.sh' --wait", ranks)
        wait_for(lambda: len(self.read("started")) == ranks)
        return run

    def read(self, name: str) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob(f"{name}?"))]

    def processes(self) -> list[psutil.Process]:
        """Everything that has the launch file on its command line: supervisor, both levels of the launcher, ranks."""
        name = f"{self.folder.name}/run.sh"
        return [p for p in psutil.process_iter(["cmdline"]) if name in (p.info["cmdline"] or [])]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path / f"two words {os.getpid()}")
    yield launch
    for process in launch.processes():
        process.kill()


ARGUMENTS = """--note "two words \\$HOME" 'a"b' '' --exit"""
PARSED = ["--note", "two words $HOME", 'a"b', "", "--exit"]


@pytest.mark.slow
def test_two_runs_at_once_of_two_forms_do_not_clash(launch: Launch, tmp_path: Path) -> None:
    other = Launch(tmp_path / "other")
    (other.folder / "start.sh").write_text('cd "$(dirname "$0")" && exec sh run.sh "$@"')
    first = launch.start(f"bash '{launch.folder.name}/run.sh' {ARGUMENTS} 0", ranks=2)
    second = other.start("bash other/start.sh --exit 3")
    assert (first.wait(120), second.wait(120)) == (0, 3)
    started = launch.read("started") + other.read("started")
    assert [rank["argv"] for rank in started[:2]] == [[f"--local_rank={rank}", *PARSED, "0"] for rank in (0, 1)]
    assert [rank["WORLD_SIZE"] for rank in started] == ["2", "2", "1"]
    assert started[0]["MASTER_PORT"] == started[1]["MASTER_PORT"] != started[2]["MASTER_PORT"]


def test_typed_deepspeed_and_executable(launch: Launch, tmp_path: Path) -> None:
    port = free_port()
    typed = launch.start(
        f"deepspeed -q --num_gpus 2 --master_port {port} '{launch.folder.name}/run.sh' {ARGUMENTS} 7", ranks=2
    )
    other = Launch(tmp_path / "other")
    executable = other.start("./other/run.sh --exit 7")
    assert (typed.wait(120), executable.wait(120)) == (7, 7)
    argv = [rank["argv"] for rank in launch.read("started")]
    assert argv[0] == ["--local_rank=0", *PARSED, "7"]  # rank 1 may have been stopped before it began
    assert other.read("started")[0]["argv"] == ["--local_rank=0", "--exit", "7"]


@pytest.mark.slow
def test_hostfile_without_ssh(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    where = f"--hostfile hosts --no_ssh --node_rank 0 --master_addr 127.0.0.1 --master_port {free_port()}"
    assert launch.start(f"deepspeed -q {where} '{launch.folder.name}/run.sh' --exit 0").wait(120) == 0
    assert [rank["WORLD_SIZE"] for rank in launch.read("started")] == ["2", "2"]


def test_hostfile_over_ssh(launch: Launch, tmp_path: Path) -> None:
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", 22)) or not shutil.which("pdsh"):
            pytest.skip("no sshd answers on port 22 of this machine, or pdsh is not installed")
    if subprocess.run(["ssh", "-o", "BatchMode=yes", "localhost", "true"], capture_output=True).returncode:
        pytest.skip("ssh to this machine needs a password")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    plain = Launch(tmp_path / "plain")  # pdsh does not quote
    where = f"--hostfile hosts --force_multi --master_addr 127.0.0.1 --master_port {free_port()}"
    assert plain.start(f"deepspeed {where} plain/run.sh --exit 0").wait(120) == 0
    assert [rank["WORLD_SIZE"] for rank in plain.read("started")] == ["2", "2"]


@pytest.mark.parametrize(
    ("first", "second", "code"), [(signal.SIGTERM, signal.SIGINT, 0), (signal.SIGINT, signal.SIGTERM, 130)]
)
def test_first_signal_saves_on_all_ranks_and_second_is_ignored(
    launch: Launch, first: int, second: int, code: int
) -> None:
    run = launch.start_waiting()
    run.send_signal(first)
    time.sleep(0.5)
    run.send_signal(second)
    assert run.wait(120) == code
    assert launch.read("saved") == [[first], [first]]
    assert not launch.processes()


def test_signal_before_the_ranks_exist(launch: Launch) -> None:
    run = launch.start(f"bash '{launch.folder.name}/run.sh' --wait")
    wait_for(lambda: any("deepspeed.launcher.runner" in process.info["cmdline"] for process in launch.processes()))
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 130
    assert not launch.processes()
    assert not launch.read("saved")


def test_killed_rank_ends_the_run(launch: Launch) -> None:
    run = launch.start_waiting()
    os.kill(launch.read("started")[1]["pid"], signal.SIGKILL)
    assert run.wait(120) == 256 - signal.SIGKILL
    assert not launch.processes()


def test_killed_launcher_is_no_success_and_the_ranks_save(launch: Launch) -> None:
    run = launch.start_waiting()
    os.kill(launch.read("started")[0]["ppid"], signal.SIGKILL)
    assert run.wait(120) == 1
    assert len(launch.read("saved")) == 2
    assert not launch.processes()


def test_killed_supervisor_leaves_no_orphans_and_the_ranks_save(launch: Launch) -> None:
    run = launch.start_waiting()
    run.kill()
    wait_for(lambda: not launch.processes())
    assert len(launch.read("saved")) == 2


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]


# ---------------------------------------------------------------------------------------------------------- env.sh

# Installs `tiny` and the project as pip does: whatever has METADATA counts as installed, INSTALLER is written last.
FAKE_PIP = """
import os, sys, sysconfig, time
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
with open(os.environ["FAKE_LOG"], "a") as log:
    print("pip", *sys.argv[1:], file=log)
if os.environ.get("FAKE_MODE") == "fail":
    sys.exit("no network")
info = site / "tiny-2.0.dist-info"
if not (info / "METADATA").exists():
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny\\nVersion: 2.0\\n")
    if os.environ.get("FAKE_MODE") == "hang":
        print("hanging", file=open(os.environ["FAKE_LOG"], "a"))
    time.sleep(60 if os.environ.get("FAKE_MODE") == "hang" else 1)
    (site / "tiny.py").write_text("")
    (info / "INSTALLER").write_text("pip")
(site / "kd_core.py").write_text("")
"""


class Clone:
    """A copy of env.sh beside a project that needs only `tiny`, and a PATH with nothing but one Python."""

    def __init__(self, root: Path, python: str):
        self.root, self.log = root, root / "pip.log"
        for folder in ("launch", "bin", "fake/pip"):
            (root / folder).mkdir(parents=True)
        shutil.copy(ROOT / "launch/env.sh", root / "launch/env.sh")
        (root / "pyproject.toml").write_text('[project]\nname = "x"\ndependencies = ["tiny>=2"]\n')
        (root / "fake/pip/__init__.py").touch()
        (root / "fake/pip/__main__.py").write_text(FAKE_PIP)
        for program in ("bash", "dirname", "mkdir", "rm"):
            (root / "bin" / program).symlink_to(str(shutil.which(program)))
        (root / "bin/python3").write_text(f"#!/bin/sh\n{python}\n")
        (root / "bin/python3").chmod(0o755)

    def start(self, *command: str, mode: str = "") -> subprocess.Popen[str]:
        env = {"PATH": str(self.root / "bin"), "FAKE_LOG": str(self.log), "FAKE_MODE": mode}
        env["PYTHONPATH"] = str(self.root / "fake")  # `python3 -m pip` is the fake; venv's ensurepip ignores this
        return subprocess.Popen(
            ["bash", self.root / "launch/env.sh", *command],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, mode: str = "") -> tuple[int, str, str]:
        process = self.start(*command, mode=mode)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def pip_calls(self) -> int:
        return self.log.read_text().count("pip install") if self.log.exists() else 0


THIS_PYTHON = f'exec "{sys.executable}" "$@"'


def test_active_environment_is_used_and_the_second_call_imports_nothing_to_find_out() -> None:
    env = dict(os.environ, PYTHONPROFILEIMPORTTIME="1", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = ["bash", ROOT / "launch/env.sh", "python3", "-c", "import sys; print(sys.prefix)"]
    subprocess.run(command, env=env, check=True)
    again = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert again.stdout.strip() == sys.prefix
    assert "importlib.metadata" in again.stderr and "torch" not in again.stderr


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exit 1", "Python 3.11 or newer is needed"),
        (f'case "$*" in *ensurepip*) exit 1 ;; esac\n{THIS_PYTHON}', "python3 has no venv module"),
    ],
)
def test_unsuitable_python_is_one_clear_line(tmp_path: Path, python: str, message: str) -> None:
    code, out, err = Clone(tmp_path / "clone", python).run("echo", "ran")
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]


def test_set_up_that_fails_is_interrupted_or_damaged_is_repaired(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "two words", THIS_PYTHON)
    command = ["python3", "-c", "import sys, tiny, kd_core; print(sys.prefix)"]
    prefix = str(clone.root / ".venv")

    code, out, err = clone.run(*command, mode="fail")
    assert (code, out) == (1, "")
    assert "pip failed, see above: check network" in err.splitlines()[-1]

    interrupted = clone.start(mode="hang")
    wait_for(lambda: "hanging" in clone.log.read_text())
    child = psutil.Process(interrupted.pid).children(recursive=True)[-1]
    interrupted.kill()
    child.kill()
    interrupted.communicate()

    # Two at once: one installs (over what the interrupted one left), the other waits for it.
    both = [clone.start(*command), clone.start(*command)]
    results = [process.communicate(timeout=120) for process in both]
    assert [out.strip() for out, err in results] == [prefix, prefix], results
    assert clone.pip_calls() == 3

    shutil.rmtree(next((clone.root / ".venv").glob("lib/python*/site-packages/pip-*")))  # half-made environment
    next((clone.root / ".venv").glob("lib/python*/site-packages/tiny.py")).unlink()
    (clone.root / "pyproject.toml").open("a").write("# changed, so it is checked anew\n")
    assert clone.run(*command)[:2] == (0, prefix + "\n")
    assert clone.pip_calls() == 4

    code, out, err = clone.run(*command)
    assert (code, out, err) == (0, prefix + "\n", "")
    assert clone.pip_calls() == 4


def test_a_launcher_that_was_paused_goes_on_whenever_its_guard_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    started = subprocess.Popen

    def told_at_once(*words: object, **how: object) -> subprocess.Popen[bytes]:
        guard: subprocess.Popen[bytes] = started(*words, **how)  # type: ignore[call-overload]
        guard.terminate()
        return guard

    with started(["sleep", "10"]) as paused:
        monkeypatch.setattr(supervisor.os, "getppid", lambda: paused.pid)
        monkeypatch.setattr(supervisor.subprocess, "Popen", told_at_once)
        monkeypatch.setenv("LOCAL_SIZE", "0")
        with supervisor.pause_launcher():
            time.sleep(0.2)
            assert psutil.Process(paused.pid).status() == psutil.STATUS_STOPPED
        assert psutil.Process(paused.pid).status() != psutil.STATUS_STOPPED
        paused.kill()
