"""Many processes, each a run with a folder of its own: spread over GPUs or cores, on one progress bar, resumable.

A run has finished when its run.json says so, and is as far as the last line of its metrics.jsonl says.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kd_core.cli import FREE_ON_RESUME
from kd_core.launch import GRACE_SECONDS, SECONDS_TO_KILL, die_with_parent
from kd_core.runs.folders import MAY_MOVE, Change, changes, foreign, mark, read_record
from kd_core.system.checked import read_lines
from kd_core.system.files import says_unlockable

SECONDS_TO_SAVE = GRACE_SECONDS + 2 * SECONDS_TO_KILL  # by then a job has ended, and so has what it is supervised by
SECONDS_TO_LEAVE = 60  # that another call has to leave a folder
RESUMED = b"--- resumed\n"  # in a job's log, before what it says then
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """A run to be made by `command`.

    Args:
        name: what the terminal calls it.
        folder: its run folder; its output lies beside it in <folder>.log.
        steps: its length, for the progress bar.
        needs: names of the jobs that must have finished before it starts.
        resumes: whether `command` with --resume continues it; otherwise it is begun anew.
        product: where the command is no run's, the file of its folder that is there once it has finished.
    """

    name: str
    folder: Path
    command: Sequence[str]
    steps: int
    needs: tuple[str, ...]
    resumes: bool
    product: str | None = field(default=None, kw_only=True)

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")


Running = dict[subprocess.Popen[bytes], tuple[Job, dict[str, str]]]  # by process, with its environment


def check_unchanged(
    job: Job, config: dict[str, Any], *, recipe: str, ranks: int = 1, defaults: dict[str, Any] | None = None
) -> list[Change]:
    """What of `job` may have been moved since it was begun, for `say_moved`.

    Args:
        defaults: as `changes`.

    Raises:
        ValueError: it was begun with another recipe, number of ranks or flag that alters it.
    """
    if not (job.folder / "run.json").exists():
        return []
    changed = changes(read_record(job.folder), {"recipe": recipe, "ranks": ranks} | config, defaults)
    for change in changed:
        if not change.known:
            raise ValueError(
                f"{job.folder} was begun with {change}; undo the change, remove that folder, or choose another --out"
            )
    return changed


def check_inputs(runs: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Raises ValueError when what may have been moved was another in one of the runs that differ in seed and length alone.

    Args:
        runs: of each its name, its config as it would be begun now, and its run.json.
    """
    first: dict[str, tuple[str, Any]] = {}
    for name, config, record in runs:
        alike = {field: value for field, value in config.items() if field not in {"seed", "steps", *FREE_ON_RESUME}}
        for flag, entry in MAY_MOVE.items():
            content = record.get(entry)
            if entry == "models":
                content = (content or {}).get(flag)
            if flag not in config or flag == "tokenizer" or not content:
                continue
            if entry == "teachers":
                content = [mark(one) for one in content]
                if mark({}) in content:  # of an earlier version
                    continue
            other, theirs = first.setdefault(json.dumps([flag, record["recipe"], alike]), (name, content))
            if content != theirs:
                raise ValueError(
                    f"{name} was made with another {flag} than {other}, for which both have {json.dumps(config[flag])} now: restore "
                    "what the other had and remove the folder of the one, or choose another --out"
                )


def finished(job: Job) -> bool:
    if job.product:
        return (job.folder / job.product).exists()
    there = (job.folder / "run.json").exists()
    return there and read_record(job.folder).get("result", {}).get("stopped") == "finished"


def steps_taken(job: Job) -> int:
    """The step of the last complete line of metrics.jsonl, 0 before the first."""
    file = job.folder / "metrics.jsonl"
    lines = read_lines(file, last=True) if file.exists() else []
    return int(lines[-1].get("step", 0)) if lines else 0


def places(jobs: int | None, ranks: int = 1, *, per_core: bool = False) -> list[dict[str, str]]:
    """The environment of each of the jobs that go on at the same time: its GPUs, or its share of the cores.

    Args:
        jobs: how many; None is one for each group of `ranks` GPUs, and without a GPU one, or one a core if `per_core`.

    Raises:
        ValueError: `jobs` is below 1, or a job needs more GPUs than there are.
    """
    count, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    groups = [",".join(gpus[i : i + ranks]) for i in range(0, count - ranks + 1, ranks)] if count else [""]
    if not groups:
        raise ValueError(f'"ranks" is {ranks}, but there are {count} GPU(s); choose fewer')
    if jobs is None:
        jobs = cores if per_core and not count else len(groups)
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    base = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    if jobs * ranks > 1:  # else every process would take all cores
        base.setdefault("OMP_NUM_THREADS", str(max(1, cores // (jobs * ranks))))
    if not count:
        return [base | {"NUM_GPUS": str(ranks)}] * jobs
    # -1: kd_core.launch takes the visible ones.
    return [base | {"NUM_GPUS": "-1", "CUDA_VISIBLE_DEVICES": groups[i % len(groups)]} for i in range(jobs)]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Keeps other calls out of the folder; yields the descriptor that holds the lock.

    Jobs inherit it: should this process be killed, the next call waits until they have saved.
    """
    with (out / ".lock").open("w") as file:
        for waited in itertools.count():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if says_unlockable(Path(file.name), error):
                    break
                if waited >= SECONDS_TO_LEAVE:
                    raise ValueError(f"--out {out} is in use by another call; choose another folder") from None
                if not waited:
                    print(f"waiting for the runs of another call to leave {out}", file=sys.stderr, flush=True)
                time.sleep(1)
        if not os.path.exists(file.name) or not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            raise ValueError(f"--out {out} was removed by the call that held it; start again")
        yield file.fileno()


def start(job: Job, place: dict[str, str], lock: int) -> subprocess.Popen[bytes]:
    """Starts or continues a job in a session of its own, its output in a log file beside its folder."""
    resume = job.resumes and (job.folder / "run.json").exists()
    if not resume:
        begun = job.product or (job.folder / "run.json").exists()
        if not begun and (others := foreign(job.folder)):
            raise ValueError(f"{job.folder} holds {others[0]}, which no run has made; move it, or choose another --out")
        shutil.rmtree(job.folder, ignore_errors=True)  # killed, perhaps before it had claimed the folder
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab" if resume else "wb") as log:
        if resume:
            log.write(RESUMED)
            log.flush()
        return subprocess.Popen(
            [*job.command, *["--resume"] * resume],
            env=place,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock],
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def stop(running: Running) -> None:
    """Has the jobs save and end, and says of each what it has saved or lost; after SECONDS_TO_SAVE they are killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("stopping: what can be continued saves first", file=sys.stderr, flush=True)
    deadline = time.monotonic() + SECONDS_TO_SAVE
    for process in running:
        process.terminate()
    for process, (job, _) in running.items():
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        if not finished(job):
            print(f"{job.name}: {why_ended(job, process.wait())}", file=sys.stderr, flush=True)


def why_ended(job: Job, code: int) -> str:
    """What a job that did not finish says about it: its error line, else its last one."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name} ({job.log})"
    last = job.log.read_bytes().rpartition(RESUMED)[2].decode(errors="replace")
    lines = [line for line in last.splitlines() if line.strip()] or ["no output"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{(errors or lines)[-1]} ({job.log})"


def run_all(
    jobs: Sequence[Job],
    at_once: Sequence[dict[str, str]],
    lock: int,
    summary: Callable[[Any], str],
    out: Path,
    what: str = "runs",
    look: Callable[[], Any] = lambda: None,
) -> None:
    """Runs what has not finished, one job in each of the environments `at_once`, on one progress bar.

    A job that fails says why, ends the process with its exit code and stops the others, which can resume; those that
    cannot are waited for.

    Args:
        lock: the descriptor that `locked` yields.
        summary: a finished job in a few words.
        out: the folder of all.
        what: what the terminal calls the jobs.
        look: called once a job has taken a step; what it raises ends all.
    """
    try:
        _run_all(jobs, at_once, lock, summary, look)
    except (SystemExit, KeyboardInterrupt):
        done = sum(map(finished, jobs))
        print(f"{done} of {len(jobs)} {what} have finished; the same call with --out {out} continues", file=sys.stderr)
        raise


def _run_all(
    jobs: Sequence[Job],
    at_once: Sequence[dict[str, str]],
    lock: int,
    summary: Callable[[Any], str],
    look: Callable[[], Any],
) -> None:
    waiting = [job for job in jobs if not finished(job)]
    free, running = list(at_once), Running()
    taken = {job.name: job.steps if finished(job) else steps_taken(job) * job.resumes for job in jobs}
    total, first, began = sum(job.steps for job in jobs), sum(taken.values()), time.monotonic()
    failed, looked = 0, set[str]()
    bar = tqdm(total=total, initial=first, unit="step", smoothing=0, dynamic_ncols=True, disable=None)
    try:
        while running or (waiting and not failed):
            going = [job for job, _ in running.values()]
            pending = {job.name for job in [*waiting, *going]}
            ready = next((job for job in waiting if not pending.intersection(job.needs)), None)
            if ready and free and not failed:
                waiting.remove(ready)
                place = free.pop()
                running[start(ready, place, lock)] = ready, place
                continue
            time.sleep(0.2)
            ended = [process for process in running if process.poll() is not None]
            now = {job.name: steps_taken(job) for job in going}
            if any(now[name] and name not in looked for name in now):
                look()
            looked |= {name for name in now if now[name]}
            taken |= now
            bar.set_postfix_str(" ".join(job.name for job in going), refresh=False)
            bar.update(sum(taken.values()) - bar.n)
            for process in ended:
                job, place = running.pop(process)
                free.append(place)
                if not finished(job):
                    tqdm.write(f"error: {job.name}: {why_ended(job, process.returncode)}", file=sys.stderr)
                    code = process.returncode or 1  # 0: told to stop, by another than this process
                    failed = failed or (code if code > 0 else 128 - code)
                    if any(other.resumes for other, _ in running.values()):
                        raise SystemExit(failed)
                    continue
                note = f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)}: {summary(job)}"
                if any(job.name in other.needs for other in waiting):
                    # What others waited for says nothing about their pace.
                    first, began = sum(taken.values()), time.monotonic()
                    bar.initial, bar.start_t = first, time.time()
                else:
                    pace = (time.monotonic() - began) / max(1, sum(taken.values()) - first)
                    note += f"; about {timedelta(seconds=round(pace * (total - sum(taken.values()))))} left"
                tqdm.write(note, file=sys.stderr)
        if failed:
            raise SystemExit(failed)
    finally:
        bar.close()
        if running:
            stop(running)
