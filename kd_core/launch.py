"""What `bash launch/bert_kd.sh` becomes once launch/env.sh has set up: a supervisor of DeepSpeed's launcher.

    python -m kd_core.launch SCRIPT [flags of the recipe]

NUM_GPUS=2 uses two GPUs (default: all; without a GPU: one rank); LAUNCHER_ARGS="--hostfile F" adds flags of `deepspeed`.

DeepSpeed starts the ranks. This process adds what its launcher leaves out: a free port, so that runs do not clash; a
signal that reaches all ranks at once, so that they can save together (the launcher stops them one after another); and
an exit code to rely on, with no rank left behind.
"""

import contextlib
import ctypes
import io
import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import psutil

SECONDS_TO_START = 60.0  # within which the launcher has started the ranks of one machine
GRACE_SECONDS = 900.0  # from the first signal until a run that hangs ends; whoever gives less time kills it himself
SECONDS_TO_KILL = 15.0  # after that a rank has ended by itself
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Lasting(io.FileIO):
    """A stream of the terminal into which can be written for ever: what nobody reads any more, or a full disk, is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def outlive_readers() -> None:
    """Has this process go on when its output cannot be written: streams closed before it began, a `tee` that has ended, a
    terminal that was closed, a log on a full disk. Output is no reason to lose a checkpoint.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would take its place, and what libraries print
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        stream = getattr(sys, name)
        if number and stream is getattr(sys, f"__{name}__"):  # not what a test has put there
            with contextlib.suppress(OSError, AttributeError):  # AttributeError: None, where it was closed
                stream.flush()
            errors = "backslashreplace" if name == "stderr" else "replace"
            lasting = io.BufferedWriter(Lasting(number, "w", closefd=False))
            encoding = getattr(stream, "encoding", "utf-8")
            setattr(sys, name, io.TextIOWrapper(lasting, encoding, errors, line_buffering=True))


def die_with_parent() -> None:
    """Has the kernel send SIGTERM to this process when its parent dies, even of kill -9; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launcher() -> int | None:
    """The process that started this rank's launcher, `deepspeed` itself; None where DeepSpeed's launcher is not the parent."""
    try:
        return psutil.Process(os.getppid()).ppid() if started_by_deepspeed() else None
    except psutil.Error:  # the parent is gone, or a machine hides its processes
        return None


def started_by_deepspeed() -> bool:
    """Whether this process is a rank of DeepSpeed's launcher, rather than, say, `nohup python recipes/x.py &`."""
    return _started_by("CROSS_RANK", "deepspeed.launcher.launch")


def started_by_launcher() -> bool:
    """Whether it is one of that or of torchrun."""
    torchrun = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
    return started_by_deepspeed() or _started_by("TORCHELASTIC_RUN_ID", *torchrun)


def _started_by(variable: str, *launchers: str) -> bool:
    """
    Args:
        variable: which the launcher sets; it may have been left over.
    """
    try:
        parent = psutil.Process().parent()
        return parent is not None and any(os.path.basename(word) in launchers for word in parent.cmdline())
    except psutil.Error:  # /proc is hidden, or the parent gone
        return variable in os.environ


@contextlib.contextmanager
def pause_launcher() -> Iterator[None]:
    """Within, DeepSpeed's launcher of this rank stands still: it kills its ranks 30 s after it was told to stop, saved or not.

    Not once it has lost one of them, whom the others would wait for.
    """
    parent = os.getppid()
    alone = True
    with contextlib.suppress(psutil.Error):
        alone = len(psutil.Process(parent).children()) < int(os.environ.get("LOCAL_SIZE", "1"))
    if alone:
        yield
        return
    # Its standard input ends when this process does, by whatever end; the launcher, which tells it to stop too, then goes on.
    # It begins with those signals blocked: a trap of its own could come too late, and the launcher would stand still for ever.
    command = ["sh", "-c", 'read -r _; kill -s CONT "$0"', str(parent)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    send(signal.SIGSTOP, parent)
    try:
        yield
    finally:
        guard.communicate()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]


def find_ranks(group: int, script: str) -> list[int]:
    """Ids of the ranks in a process group. Not by descent: a dead launcher's ranks are nobody's children."""
    parent_of = {}
    for process in psutil.process_iter(["pid", "ppid", "cmdline"]):
        if (process.info["cmdline"] or [])[1:3] == ["-u", script]:  # python -u SCRIPT --local_rank=0 ...
            try:
                if os.getpgid(process.pid) == group:
                    parent_of[process.pid] = process.info["ppid"]
            except ProcessLookupError:
                continue  # ended since it was listed
    return [pid for pid, parent in parent_of.items() if parent not in parent_of]  # without forked data loaders


def parent_of_ranks(launcher: int) -> psutil.Process | None:
    """The child of DeepSpeed's launcher that starts this machine's ranks, once it is there."""
    try:
        children = psutil.Process(launcher).children()
        return next((child for child in children if "deepspeed.launcher.launch" in child.cmdline()), None)
    except psutil.Error:  # one of them has ended
        return None


def send(signum: int, *pids: int) -> None:
    """Send a signal; a negative id means a process group. What has already ended is not an error."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def grace_seconds(flags: Sequence[str]) -> float:
    """What --grace-seconds says in a recipe's flags; what is wrong there, the recipe refuses."""
    value = GRACE_SECONDS
    for flag, following in itertools.pairwise([*flags, ""]):
        with contextlib.suppress(ValueError):
            if flag.startswith("--grace-seconds"):
                value = float(flag.partition("=")[2] or following)
    return value


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m kd_core.launch SCRIPT [flags of the recipe]")
    outlive_readers()
    script, *flags = sys.argv[1:]
    received = 0

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        received = received or signum  # the ranks are saving since the first signal: a second changes nothing

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, remember)
    seconds_to_save = grace_seconds(flags) + SECONDS_TO_KILL

    env = dict(os.environ)
    on_cpu = env.get("DS_ACCELERATOR") == "cpu"
    num_gpus = env.get("NUM_GPUS", "1" if on_cpu else "-1")
    if on_cpu and num_gpus.isdecimal() and int(num_gpus) > 1:  # else every rank would take all cores
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(num_gpus))))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q"]
    command += [f"--num_gpus={num_gpus}", f"--master_port={free_port()}"]
    command += shlex.split(env.get("LAUNCHER_ARGS", ""))
    # A session of its own: Ctrl-C in a terminal reaches this process only, and the group is the launcher and its ranks.
    launcher = subprocess.Popen([*command, script, *flags], env=env, start_new_session=True)
    group = launcher.pid
    # Its standard input ends when this process does: should that be by kill -9, it stops the run in our place.
    stop_all = 'kill -s TERM -- "-$0"'
    guard_command = ["sh", "-c", f"trap '{stop_all}' TERM INT HUP; read -r _; {stop_all}", str(group)]
    guard = subprocess.Popen(guard_command, stdin=subprocess.PIPE, start_new_session=True)

    ranks: list[int] = []
    # The launcher exits with 0 when its inner process was killed with -9, and leaves the ranks running. It takes its time,
    # in which they may save and end, so they are looked for at once.
    orphans: list[int] = []
    inner, searched_until = None, time.monotonic() + SECONDS_TO_START
    deadline = float("inf")
    while launcher.poll() is None and time.monotonic() < deadline:
        if received and deadline == float("inf"):
            deadline = time.monotonic() + seconds_to_save
            ranks = find_ranks(group, script)
            send(received, *ranks)
            if not ranks:  # still starting: nothing to save
                send(signal.SIGTERM, -group)
        if inner is None and time.monotonic() < searched_until:  # on several machines it is no child of the launcher
            inner = parent_of_ranks(launcher.pid)
        elif inner and not orphans and not inner.is_running():
            orphans = find_ranks(group, script)
        time.sleep(0.1)

    if not orphans and launcher.poll() is not None:
        orphans = find_ranks(group, script)
    if orphans and not launcher.returncode:
        print(f"kd_core.launch: the launcher died before its {len(orphans)} ranks: stopping them", file=sys.stderr)
    if orphans:
        send(signal.SIGTERM, *orphans)
        deadline = min(deadline, time.monotonic() + seconds_to_save)
        while find_ranks(group, script) and time.monotonic() < deadline:
            time.sleep(0.1)
    if launcher.poll() is None or find_ranks(group, script):
        send(signal.SIGKILL, -group)
    code = launcher.wait() or (1 if orphans else 0)
    guard.kill()
    guard.wait()

    if received and (not ranks or code in (0, 256 - received)):  # 256 - received: a rank had not set its handler yet
        return 0 if ranks and code == 0 and received != signal.SIGINT else 128 + received
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
