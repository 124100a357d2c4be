"""A matched study: arms x lengths x seeds of one recipe, interleaved and resumable, then the time-to-quality reports.

    bash launch/study.sh STUDY.json [--out DIR] [--jobs N]      (the same: python -m kd_core.study)

A study file, of which the entries from `flags` on may be left out:

    {
      "recipe": "recipes/bert_kd.py",
      "arms": {"baseline": "", "kd": "--teachers {teacher} --kd-ratio 0.9"},
      "baseline": "baseline",
      "lengths": [150, 300],
      "seeds": [1, 2],
      "flags": "--student tiny --data embedded",
      "teacher": "--student mini --steps 300",
      "metric": "eval/loss",
      "lower_is_better": true,
      "may_differ": [],
      "ranks": 1
    }

An arm is the flags that it adds to `flags`; `lengths` are --steps; `teacher`, flags over `flags` too, is trained first and
named {teacher} in the arms; `metric`, `lower_is_better` (for a metric that the report does not know) and `may_differ` are
the report's flags; `ranks` is the number of processes (GPUs) of one run. Runs lie in DIR/<arm>/<steps>/<seed>,
their output beside them in <seed>.log, the reports of each arm against `baseline` in DIR/report/<arm>.

The same call continues a study that was stopped or killed. What has finished is kept, so arms, lengths and seeds can be
added; a flag that would alter a run already begun is refused.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from kd_core import cli, quality_curves, report, time_to_quality
from kd_core.launch import SECONDS_TO_SAVE, die_with_parent

TEACHER, REPORT = "teacher", "report"  # folders of the study beside those of the arms
NO_ARM = (TEACHER, f"{TEACHER}.log", REPORT, "study.json")
RESUMED = b"--- resumed\n"  # in a run's log, before what it says then
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Study:
    """The study file's entries; the module's docstring says what they mean."""

    recipe: str
    arms: dict[str, str]
    baseline: str
    lengths: list[int]
    seeds: list[int]
    flags: str = ""
    teacher: str | None = None
    metric: str = "eval/loss"
    lower_is_better: bool | None = None
    may_differ: Sequence[str] = ()
    ranks: int = 1

    def __post_init__(self) -> None:
        def different(values: Any, least: int) -> bool:
            whole = isinstance(values, list) and all(type(value) is int and value >= least for value in values)
            return whole and 0 < len(values) == len(set(values))

        def are_flags(text: Any) -> bool:
            try:
                return isinstance(text, str) and shlex.split(text) is not None
            except ValueError:  # a quote that does not close
                return False

        arms = self.arms if isinstance(self.arms, dict) else {}
        arms_ok = len(arms) > 1 and all(
            are_flags(flags) and re.fullmatch(r"\w[\w.+-]*", name) and name not in NO_ARM
            for name, flags in arms.items()
        )
        fields_ok = isinstance(self.may_differ, Sequence) and all(isinstance(name, str) for name in self.may_differ)
        checks = {
            "recipe": (isinstance(self.recipe, str), "the file of a recipe"),
            "arms": (arms_ok, f"two or more names (not {' or '.join(NO_ARM)}), each with its flags as one text"),
            "baseline": (self.baseline in list(arms), f"one of the arms {list(arms)}"),
            "lengths": (different(self.lengths, 1), "a list of different numbers of steps"),
            "seeds": (different(self.seeds, 0), "a list of different seeds"),
            "flags": (are_flags(self.flags), "flags as one text, its quotes closed"),
            "teacher": (self.teacher is None or are_flags(self.teacher), "flags as one text, its quotes closed"),
            "metric": (isinstance(self.metric, str), "the name of an evaluation metric, such as eval/loss"),
            "lower_is_better": (isinstance(self.lower_is_better, bool | None), "true or false"),
            "may_differ": (not isinstance(self.may_differ, str) and fields_ok, "a list of fields of the runs' config"),
            "ranks": (type(self.ranks) is int and self.ranks > 0, "a number of processes, at least 1"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise ValueError(f'"{name}" must be {allowed}, got {json.dumps(getattr(self, name))}')


class Run(NamedTuple):
    """One training of the design: `name` is its folder within the study's, `command` starts it anew."""

    name: str
    folder: Path
    config: Any
    command: list[str]

    @property
    def arm(self) -> str:
        return self.name.split("/")[0]

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")


def read_study(file: Path) -> Study:
    """The study that `file` describes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, an unknown or a missing entry, a value that is not allowed.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a study file such as launch/example_study.json")
    fields = dataclasses.fields(Study)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    try:
        entries = json.loads(file.read_text())
        wrong = sorted(needed - set(entries)) + sorted(set(entries) - {field.name for field in fields})
        if wrong:
            known = ", ".join(field.name for field in fields)
            problem = "lacks" if wrong[0] in needed else "has an unknown entry"
            raise ValueError(f'{problem} "{wrong[0]}"; its entries are {known}')
        return Study(**entries)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def interleaved(study: Study) -> Iterator[tuple[str, int, int]]:
    """(arm, steps, seed) in the order of running: arms innermost, their order rotated from block to block.

    So a machine that drifts hits all arms alike, and after each seed there is a complete, if small, design.
    """
    arms = list(study.arms)
    for i, seed in enumerate(study.seeds):
        for j, steps in enumerate(study.lengths):
            first = (i + j) % len(arms)
            yield from ((arm, steps, seed) for arm in arms[first:] + arms[:first])


def design(study: Study, out: Path) -> list[Run]:
    """All runs of `study` under the absolute folder `out`, in their order; the teacher's first if it has one.

    Raises:
        FileNotFoundError: the recipe does not exist.
        ValueError: a flag that the recipe refuses or the study sets, {teacher} without the entry "teacher", or runs of
            which the report could say nothing: arms that cannot be compared, an unknown metric.
    """
    time_to_quality.direction(study.metric, study.lower_is_better)
    root = Path(__file__).resolve().parents[1]
    recipe = next((path for path in (Path(study.recipe), root / study.recipe) if path.is_file()), None)
    if recipe is None:
        raise FileNotFoundError(f'"recipe" {study.recipe} does not exist; give a file such as recipes/bert_kd.py')
    config_type = runpy.run_path(str(recipe)).get("Config")
    if config_type is None:
        raise ValueError(f'"recipe" {study.recipe} has no Config; give a file such as recipes/bert_kd.py')
    start = [str(recipe)] if study.ranks == 1 else ["-m", "kd_core.launch", str(recipe)]

    def run(name: str, flags: str, *own: object) -> Run:
        words = shlex.split(f"{study.flags} {flags}")
        for word in words:
            if word.split("=")[0] in ("--out", "--resume", *own):
                raise ValueError(f"the study itself sets {word}; remove it")
            if "{teacher}" in word and study.teacher is None:
                raise ValueError('{teacher} needs the entry "teacher", the flags that train it')
        words = [word.replace("{teacher}", str(out / TEACHER)) for word in words]
        words += [str(word) for word in ("--out", out / name, *own)]
        return Run(name, out / name, cli.parse(config_type, words), [sys.executable, *start, *words])

    def arm_run(arm: str, steps: int, seed: int) -> Run:
        try:
            return run(f"{arm}/{steps}/{seed}", study.arms[arm], "--steps", steps, "--seed", seed)
        except ValueError as error:
            raise ValueError(f'arm "{arm}": {error}') from None

    teacher = [run(TEACHER, study.teacher)] if study.teacher is not None else []
    runs = [arm_run(*point) for point in interleaved(study)]

    def planned(arm: str) -> list[quality_curves.Run]:
        own = ((run.folder, dataclasses.asdict(run.config)) for run in runs if run.arm == arm)
        return [quality_curves.Run(*pair, np.empty(0), np.empty((0, 6)), window_s=None) for pair in own]

    for arm in study.arms:
        if arm != study.baseline:
            time_to_quality.refuse_unlike(planned(study.baseline), planned(arm), study.may_differ)
    return teacher + runs


def check_unchanged(run: Run, study: Study) -> None:
    """Raises ValueError when `run` was begun with another recipe, number of ranks or flag that alters it."""
    file = run.folder / "run.json"
    if not file.exists():
        return
    try:
        there = json.loads(file.read_text())
        before = {"recipe": there["recipe"], "ranks": there["world_size"]} | there["config"]
        finished(run)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is no run's, or damaged ({what}); remove that folder") from None
    now = {"recipe": Path(study.recipe).stem, "ranks": study.ranks} | dataclasses.asdict(run.config)
    for name, value in json.loads(json.dumps(now)).items():
        if name not in cli.FREE_ON_RESUME and before.get(name) != value:
            raise ValueError(
                f"{run.folder} was begun with {name} {json.dumps(before.get(name))}, the study now says "
                f"{json.dumps(value)}; undo the change, remove that folder, or choose another --out"
            )


def finished(run: Run) -> bool:
    file = run.folder / "run.json"
    return file.exists() and json.loads(file.read_text()).get("result", {}).get("stopped") == "finished"


def steps_taken(run: Run) -> int:
    """The step of the last complete line of metrics.jsonl, 0 before the first."""
    file = run.folder / "metrics.jsonl"
    complete = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return int(json.loads(complete[-1])["step"]) if complete else 0


def places(jobs: int | None, ranks: int) -> list[dict[str, str]]:
    """The environment of each of the runs that go on at the same time: its GPUs, or its share of the cores.

    Raises:
        ValueError: `jobs` is below 1, or a run needs more GPUs than there are.
    """
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    groups = [",".join(gpus[i : i + ranks]) for i in range(0, count - ranks + 1, ranks)] if count else [""]
    if not groups:
        raise ValueError(f'"ranks" is {ranks}, but there are {count} GPU(s); choose fewer')
    jobs = len(groups) if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    base = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    if jobs * ranks > 1:  # else every process would take all cores
        base.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (jobs * ranks))))
    if not count:
        return [base | {"NUM_GPUS": str(ranks)}] * jobs
    # -1: kd_core.launch takes the visible ones.
    return [base | {"NUM_GPUS": "-1", "CUDA_VISIBLE_DEVICES": groups[i % len(groups)]} for i in range(jobs)]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Keeps other studies out of the folder; yields the descriptor that holds the lock.

    Runs inherit it: should this process be killed, the next call waits until they have saved.
    """
    with (out / ".lock").open("w") as file:
        for waited in itertools.count():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited >= SECONDS_TO_SAVE:
                    raise ValueError(f"--out {out} is in use by another study; choose another folder") from None
                if not waited:
                    print(f"waiting for the runs of another call to leave {out}", file=sys.stderr, flush=True)
                time.sleep(1)
        yield file.fileno()


def start(run: Run, place: dict[str, str], lock: int) -> subprocess.Popen[bytes]:
    """Starts or continues a run in a session of its own, its output in a log file beside its folder."""
    begun = (run.folder / "run.json").exists()
    if not begun:
        shutil.rmtree(run.folder, ignore_errors=True)  # killed before it had claimed the folder
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab" if begun else "wb") as log:
        if begun:
            log.write(RESUMED)
            log.flush()
        return subprocess.Popen(
            run.command + ["--resume"] * begun,
            env=place,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock],
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def stop(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Has the runs save and end; what still runs after SECONDS_TO_SAVE is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    print("stopping: what runs saves first", file=sys.stderr, flush=True)
    deadline = time.monotonic() + SECONDS_TO_SAVE
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def why_ended(run: Run, code: int) -> str:
    """What a run that did not finish says about it: its error line, else its last one."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name} ({run.log})"
    last = run.log.read_bytes().rpartition(RESUMED)[2].decode(errors="replace")
    lines = [line for line in last.splitlines() if line.strip()] or ["no output"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{(errors or lines)[-1]} ({run.log})"


def train(runs: Sequence[Run], at_once: Sequence[dict[str, str]], lock: int, metric: str) -> None:
    """Runs what has not finished, one run in each of the environments `at_once`, on one progress bar.

    A run that fails stops the others, says why and ends the process with its exit code.

    Raises:
        ValueError: the recipe does not write `metric`.
    """
    waiting = [run for run in runs if not finished(run)]
    free, running = list(at_once), dict[subprocess.Popen[bytes], tuple[Run, dict[str, str]]]()
    taken = {run.name: steps_taken(run) for run in runs}
    total, first, began = sum(run.config.steps for run in runs), sum(taken.values()), time.monotonic()
    bar = tqdm(total=total, initial=first, unit="step", smoothing=0, dynamic_ncols=True, disable=None)
    try:
        while waiting or running:
            if waiting and free and not any(run.name == TEACHER for run, _ in running.values()):
                run, place = waiting.pop(0), free.pop()
                running[start(run, place, lock)] = run, place
                continue
            time.sleep(0.2)
            ended = [process for process in running if process.poll() is not None]
            taken |= {run.name: steps_taken(run) for run, _ in running.values()}
            bar.set_postfix_str(" ".join(run.name for run, _ in running.values()), refresh=False)
            bar.update(sum(taken.values()) - bar.n)
            for process in ended:
                run, place = running.pop(process)
                free.append(place)
                if not finished(run):
                    tqdm.write(f"error: {run.name}: {why_ended(run, process.returncode)}", file=sys.stderr)
                    code = process.returncode or 1  # 0: told to stop, by another than the study
                    raise SystemExit(code if code > 0 else 128 - code)
                note = f"{len(runs) - len(waiting) - len(running)} of {len(runs)}: {summary(run, metric)}"
                if run.name == TEACHER:  # its pace says nothing about the runs to come
                    first, began = sum(taken.values()), time.monotonic()
                    bar.initial, bar.start_t = first, time.time()
                else:
                    pace = (time.monotonic() - began) / max(1, sum(taken.values()) - first)
                    note += f"; about {timedelta(seconds=round(pace * (total - sum(taken.values()))))} left"
                tqdm.write(note, file=sys.stderr)
    finally:
        bar.close()
        if running:
            stop(running)


def summary(run: Run, metric: str) -> str:
    """A finished run in a few words."""
    result = json.loads((run.folder / "run.json").read_text())["result"]
    if metric not in result:
        known = ", ".join(name for name in result if "/" in name)
        raise ValueError(f'"metric" {metric} is none of those that {run.folder} has: {known}')
    return f"{run.name} {metric} {result[metric]:.4f}, {result['train_s']:.0f} s of training"


def main() -> None:
    parser = cli.OneLineParser(prog="python -m kd_core.study", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, metavar="STUDY.json", help="what to run; see the top of kd_core/study.py")
    parser.add_argument("--out", type=Path, help="folder of the study; default runs/study/<name of the file>")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one a GPU, or one without a GPU")
    with cli.one_line_errors():
        args = parser.parse_args()
        study = read_study(args.study)
        out = (args.out or Path("runs/study") / args.study.stem).resolve()
        runs, at_once = design(study, out), places(args.jobs, study.ranks)
        if out.exists() and not (out / "study.json").is_file() and (out.is_file() or list(out.glob("[!.]*"))):
            raise ValueError(f"--out {out} exists and holds no study; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        with locked(out) as lock:
            for run in runs:
                check_unchanged(run, study)
            report.write_atomic(out / "study.json", args.study.read_text())
            try:
                train(runs, at_once, lock, study.metric)
            except (SystemExit, KeyboardInterrupt):
                done = sum(map(finished, runs))
                print(f"{done} of {len(runs)} runs have finished; the same call again continues", file=sys.stderr)
                raise
            for arm in study.arms:
                if arm != study.baseline:
                    pair = ([run.folder for run in runs if run.arm == name] for name in (study.baseline, arm))
                    time_to_quality.report(
                        *pair,
                        metric=study.metric,
                        lower_is_better=study.lower_is_better,
                        may_differ=study.may_differ,
                        out=out / REPORT / arm,
                    )


if __name__ == "__main__":
    main()
