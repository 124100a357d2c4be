"""Python processes that need not import torch, DeepSpeed and transformers: forked from one that has, six seconds sooner.

`Popen` and `run` are subprocess's. A command is forked when it is `python script.py ...` or `python -m module ...` in the
environment of `cpu_environment`, with at most other variables that nothing reads while those packages are imported; any
other is started as ever. The fork is the caller's own child: it can be waited for and killed.
"""

import ctypes
import functools
import inspect
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT, cpu_environment, free_port

LATER = ("KD_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "NUM_GPUS", "PYTHONPATH", "PYTEST_")
SET_CHILD_SUBREAPER = 36  # prctl(2)


@functools.cache
def server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, str(ROOT / "tests" / "warm_server.py"), str(theirs.fileno())]
    subprocess.Popen(command, env=cpu_environment(), pass_fds=[theirs.fileno()], cwd="/")
    theirs.close()
    return ours


def can_be_forked(words: list[str], env: dict[str, str]) -> bool:
    base = cpu_environment()
    differ = {name for name in base.keys() | env.keys() if base.get(name) != env.get(name)}
    return (
        sys.platform == "linux"
        and words[0] == sys.executable
        and (words[1].endswith(".py") or (words[1] == "-m" and words[2].startswith("kd_core.")))
        and all(name.startswith(LATER) for name in differ)
    )


class Popen(subprocess.Popen[Any]):
    def _execute_child(self, *given: Any) -> None:  # type: ignore[misc]
        told = inspect.signature(super()._execute_child).bind(*given).arguments  # type: ignore[misc]
        words, env = list(map(os.fspath, told["args"])), told["env"] or dict(os.environ)
        if not can_be_forked(words, env):
            super()._execute_child(*given)  # type: ignore[misc]
            return
        cwd = os.fspath(told["cwd"] or os.getcwd())
        module = words[2] if words[1] == "-m" else ""
        message = {
            "words": words[2:] if module else words[1:],  # runpy puts a module's file in place of its name
            "module": module,
            "path": cwd if module else os.path.dirname(os.path.realpath(os.path.join(cwd, words[1]))),
            "cwd": cwd,
            "env": env,
            "session": told["start_new_session"],
            "file_size": resource.getrlimit(resource.RLIMIT_FSIZE),
        }
        pipes = [told[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        files = [own if own != -1 else number for number, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        libc = ctypes.CDLL(None)
        libc.prctl(SET_CHILD_SUBREAPER, 1)
        socket.send_fds(server(), [json.dumps(message).encode()], files)
        self.pid = int(server().recv(100))
        server().recv(100)  # its parent is gone
        libc.prctl(SET_CHILD_SUBREAPER, 0)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(words: list[str], *, timeout: float = 240, **how: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run with the output captured as text."""
    with Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def begin(count: int, words: Sequence[object], folder: Path, **environment: str) -> list[Popen]:
    """`python *words` on each rank of a world without a launcher, in `folder`, where <rank>.out and <rank>.log are written."""
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | environment
    started = []
    for rank in range(count):
        env = cpu_environment(RANK=str(rank), LOCAL_RANK=str(rank), **world)
        with (folder / f"{rank}.out").open("a") as out, (folder / f"{rank}.log").open("a") as log:
            started.append(Popen([sys.executable, *map(str, words)], cwd=folder, env=env, stdout=out, stderr=log))
    return started


def ranks(count: int, words: Sequence[object], **environment: str) -> subprocess.CompletedProcess[str]:
    """What `begin` begins, to its end; what all ranks have said, and the exit code of the first that has failed."""
    with tempfile.TemporaryDirectory() as name:
        started = begin(count, words, Path(name), **environment)
        codes = [process.wait(240) for process in started]
        out, log = (
            "".join((Path(name) / f"{rank}.{kind}").read_text() for rank in range(count)) for kind in ("out", "log")
        )
    return subprocess.CompletedProcess(list(words), next(filter(None, codes), 0), out, log)


def kill(started: list[Popen]) -> None:
    """With -9, the processes and what they have started, at once, so that nothing is saved."""
    processes = [psutil.Process(one.pid) for one in started]
    for process in [*processes, *(child for one in processes for child in one.children(recursive=True))]:
        process.send_signal(signal.SIGKILL)
    for one in started:
        one.wait()
