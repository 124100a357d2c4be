"""What a run writes down: run.json, metrics.jsonl, TensorBoard, a progress bar, and seconds by part.

Only rank 0 writes; on the other ranks a `Run` does nothing. The layout of a run folder and the names in its files are
fixed: programs outside this project read them.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from kd_core.cli import FREE_ON_RESUME, SharedFlags
from kd_core.training import engine
from kd_core.training.schedules import window_closed

if TYPE_CHECKING:
    from kd_core.teachers.pool import TeacherPool

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "datasets", "tokenizers", "torchvision")


class Stopwatch:
    """Seconds by part of a run, without synchronising: CUDA events are read when they have passed.

    Parts nest: "teacher" and "data" are also counted within "train", "teacher/2" within "teacher". On resume, seconds and
    calls continue from those given.
    """

    def __init__(
        self, seconds: dict[str, float], calls: dict[str, int] | None = None, *, compiling: bool = False
    ) -> None:
        self.seconds = {"train": 0.0, "teacher": 0.0, "data": 0.0, **seconds}
        self.calls = dict(calls or {})
        self._cuda = torch.cuda.is_available()
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        # The first steps compile: they are counted at the time of the first step after them.
        self._compiling = 3 if compiling else 0
        self._skipped = 0

    @contextlib.contextmanager
    def part(self, name: str, on_host: bool = False) -> Iterator[None]:
        """Counts the block under `name`; `on_host` measures what the host waits for, such as data."""
        self.calls[name] = self.calls.get(name, 0) + 1
        if self._cuda and not on_host:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - began)

    def read(self, wait: bool = False) -> dict[str, float]:
        """Seconds by part so far; with `wait` the GPU finishes first, otherwise the last step may be missing."""
        if wait and self._cuda:
            torch.cuda.synchronize()
        while self._events and self._events[0][2].query():
            name, start, end = self._events.popleft()
            self._add(name, start.elapsed_time(end) / 1000)
        return dict(self.seconds)

    def _add(self, name: str, seconds: float) -> None:
        if not self._compiling:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds * (1 + self._skipped)
        if name == "train":  # the end of a step: its other parts came before
            self._skipped = self._skipped + 1 if self._compiling else 0
            self._compiling = max(0, self._compiling - 1)


def resumed_clock(state: dict[str, Any], *, compiling: bool = False) -> Stopwatch:
    """This rank's clock of a checkpoint's state, in whose "clocks" every rank's `seconds` and `calls` stand."""
    clocks = state.get("clocks")
    return Stopwatch(*(clocks[engine.rank()] if clocks else (state.get("seconds", {}),)), compiling=compiling)


def check_folder(cfg: SharedFlags) -> dict[str, Any]:
    """run.json of the run to resume, {} for a new run.

    Raises:
        ValueError: `--out` holds a run and --resume is not set, or the reverse, or a changed flag would alter it.
    """
    folder = Path(cfg.out or "")
    if cfg.out is None and cfg.resume:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    if cfg.resume:
        return _check_resumed(cfg, folder)
    if cfg.out and (folder / "run.json").exists():
        raise ValueError(f"--out {folder} holds a run; add --resume to continue it, or choose another folder")
    if cfg.out and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {folder} exists and is not an empty folder; choose another folder")
    return {}


def says_finished(cfg: SharedFlags) -> bool:
    """Whether `--resume` names a run that has finished; says so. Every rank must ask, before joining the others."""
    finished = cfg.resume and check_folder(cfg).get("result", {}).get("stopped") == "finished"
    if finished and engine.local_rank() == 0:
        print(f"{cfg.out} has finished; there is nothing to resume")
    return finished


def claim_folder(cfg: SharedFlags, recipe: str, undo: contextlib.ExitStack) -> Path:
    """The run folder: `--out`, or the next free number under runs/<recipe>; `undo` takes away what is made here.

    Rank 0 claims it; the other ranks get its answer by broadcast, once all have joined.

    Raises:
        ValueError: as `check_folder`.
        OSError: the folder cannot be made or written.
    """
    if engine.rank() != 0:
        return Path()
    check_folder(cfg)
    folder = Path(cfg.out or "")
    if cfg.resume:
        return folder
    try:
        if cfg.out is None:
            folder = _next_free(Path("runs") / recipe)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        elif not folder.exists():
            folder.mkdir(parents=True)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        write_atomic(folder / "run.json", json.dumps(describe(recipe, cfg), indent=2) + "\n")
        undo.callback((folder / "run.json").unlink, missing_ok=True)
    except OSError as error:
        raise OSError(
            f"--out {folder} cannot be written ({error.strerror}); choose a folder on a disk with room"
        ) from None
    return folder


def _next_free(parent: Path) -> Path:
    """Makes and returns the folder with the number after the largest; another run may take one at the same moment."""
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(child.name) for child in parent.iterdir() if child.name.isdecimal()), default=0)
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            (parent / str(number)).mkdir()
            return parent / str(number)


def _check_resumed(cfg: SharedFlags, folder: Path) -> dict[str, Any]:
    if not (folder / "run.json").exists():
        raise ValueError(f"--resume: --out {folder} holds no run (no run.json); leave out --resume to start one")
    before = json.loads((folder / "run.json").read_text())
    now, default = (json.loads(json.dumps(dataclasses.asdict(flags))) for flags in (cfg, type(cfg)()))
    was = default | before["config"]  # a flag that is younger than the run had its default
    for name, value in now.items():
        if name not in FREE_ON_RESUME and was[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--resume: {flag} was {was[name]!r} and is now {value!r}, which would alter the run; "
                f"leave {flag} out, or start a new run in another --out"
            )
    if before["world_size"] != engine.world_size():
        raise ValueError(
            f"--resume: the run had {before['world_size']} rank(s), now {engine.world_size()}; use as many as before"
        )
    return dict(before)


def check_data(cfg: SharedFlags, fingerprint: str) -> None:
    """Raises ValueError when a run is resumed on other data than it began with."""
    before = check_folder(cfg).get("data", fingerprint) if cfg.resume else fingerprint
    if before != fingerprint:
        raise ValueError("--resume: --data does not hold what the run began with; restore it, or start a new run")


def check_teachers(cfg: SharedFlags, fingerprints: Sequence[Any]) -> None:
    """Raises ValueError when a run is resumed with a teacher that is not what it began with."""
    before = check_folder(cfg).get("teachers", ()) if cfg.resume else ()
    for one, now in zip(before, fingerprints, strict=False):  # none before the first step
        if one.get("fingerprint", now) != now:
            raise ValueError(
                f"--resume: --teachers {one['name']} is not what the run began with; restore it, or start a new run"
            )


def needs_teachers(cfg: SharedFlags) -> bool:
    """Whether teachers are still asked: they distil, and the newest checkpoint of a resumed run is in their window."""
    if not (cfg.distils and cfg.resume):
        return cfg.distils
    steps = sorted(path.name for path in Path(cfg.out or "", "checkpoints").glob("step*"))
    answered = check_folder(cfg).get("teachers", ())
    # A run that is older than fingerprints takes its masks from the caches themselves.
    known = answered and all("fingerprint" in one for one in answered)
    return not (known and window_closed(cfg, engine.step_of(steps[-1] if steps else None)))


def replace_folder(folder: Path, *savers: Callable[[str], Any]) -> None:
    """Has `savers` write into a hidden folder, then renames it to `folder`: complete or absent."""
    hidden = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    for save in savers:
        save(str(hidden))
    shutil.rmtree(folder, ignore_errors=True)
    hidden.rename(folder)


class Run:
    """The files and the terminal of one run. Make it on every rank; only rank 0's writes.

    Args:
        folder: the run folder, from `claim_folder`.
        steps: length of the run, for the progress bar.
        first: the checkpoint's step on resume, else 0; lines after it are dropped, so that each step appears once.
        record: fields of run.json to set, such as the data's fingerprint.
    """

    def __init__(self, folder: Path, cfg: SharedFlags, *, first: int = 0, **record: Any) -> None:
        self.folder, self.steps, self.first = folder, cfg.steps, first
        self._rate_from = first
        self._pool: TeacherPool | None = None
        self.writer = engine.rank() == 0
        if not self.writer:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._record = json.loads((folder / "run.json").read_text())
        self._record.pop("result", None)
        self.update(config=dataclasses.asdict(cfg), argv=sys.argv, **record)
        metrics = folder / "metrics.jsonl"
        self._drop_lines_after(metrics, first)
        self._metrics = metrics.open("a")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        self._bar = tqdm(
            total=self.steps, initial=first, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self._began: float | None = None
        self.say(f"{self.steps} steps into {folder}" + (f", from step {first}" if first else ""))
        if cfg.teachers and not cfg.distils:
            self.say("--teachers are not used: --kd-ratio is 0")

    @staticmethod
    def _drop_lines_after(metrics: Path, step: int) -> None:
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomic(metrics, "".join(kept))

    def update(self, **fields: Any) -> None:
        """Sets fields of run.json, at once and atomically."""
        if self.writer:
            self._record |= fields
            write_atomic(self.folder / "run.json", json.dumps(self._record, indent=2, allow_nan=False) + "\n")

    def say(self, text: str) -> None:
        """A line for the reader of the terminal, above the progress bar."""
        if self.writer:
            tqdm.write(text, file=sys.stderr)

    def teachers(
        self, pool: "TeacherPool", evaluate: Callable[[Any], dict[str, float]], clock: Stopwatch, *, chance_loss: float
    ) -> None:
        """Evaluates every teacher once, before the first step, so that a broken one shows there; call on every rank.

        Args:
            chance_loss: `eval/loss` of a guess; a teacher above it is warned of.

        Raises:
            ValueError: a teacher's score is not finite.
        """
        self._pool, self._clock = pool, clock
        if not len(pool):
            return
        if self.first:
            known = engine.broadcast(self._record["teachers"] if self.writer else [])
        else:
            known = []
            for name, fingerprint, score in zip(pool.names, pool.fingerprints, pool.scores(evaluate), strict=True):
                require_finite(f"--teachers {name}", score)
                self.say(f"teacher {name} " + " ".join(f"{metric} {value:.4f}" for metric, value in score.items()))
                if worse := not score["eval/loss"] < chance_loss:
                    self.say(f"warning: teacher {name} is worse than a guess, whose loss is {chance_loss:.4f}")
                known.append({"name": name, **score, "worse_than_chance": worse, "fingerprint": fingerprint})
        pool.weigh([score["eval/loss"] for score in known])
        pool.keep_held()
        sizes = (engine.total(torch.tensor(pool.device_bytes())) / engine.world_size()).tolist()
        self.update(teachers=[one | {"device_bytes": int(size)} for one, size in zip(known, sizes, strict=True)])

    def _teacher_costs(self) -> None:
        """A line a teacher, over all ranks: how often it was asked, and what that took; also into run.json."""
        if self._pool is None or "teacher" not in self._clock.calls:
            return
        seconds, calls = self._clock.read(wait=True), self._clock.calls
        parts = [f"teacher/{index}" for index in range(len(self._pool.names))]
        mine = [(calls.get(part, 0), seconds.get(part, 0.0)) for part in parts] + [(1, seconds["train"])]
        *rows, (ranks, train_s) = engine.total(torch.tensor(mine)).tolist()
        if not self.writer:
            return
        costs = [
            one | {"forwards": int(forwards), "seconds": took / ranks, "share": took / train_s if train_s else 0.0}
            for one, (forwards, took) in zip(self._record["teachers"], rows, strict=True)
        ]
        self.update(teachers=costs)
        self.say(f"{'forwards':>9} {'seconds':>9} {'of steps':>9} {'MiB':>9}  teacher")
        for one in costs:
            size = one["device_bytes"] / 2**20
            self.say(f"{one['forwards']:9} {one['seconds']:9.1f} {one['share']:9.1%} {size:9.1f}  {one['name']}")

    def log(self, line: dict[str, Any], clock: Stopwatch, *, write: bool) -> None:
        """Shows a step's line; with `write`, or when it holds an evaluation, also metrics.jsonl and TensorBoard."""
        evaluated = {name: value for name, value in line.items() if name.startswith("eval/")}
        seconds = clock.read(wait=bool(evaluated))  # on every rank: it frees what has been read
        if not self.writer:
            return
        values = line | {f"{part}_s": round(value, 6) for part, value in seconds.items() if "/" not in part}
        if write or evaluated:
            self._metrics.write(json.dumps(values) + "\n")
            self._metrics.flush()
            for name, value in values.items():
                if isinstance(value, int | float) and name != "step":
                    self._tensorboard.add_scalar(name if "/" in name else f"train/{name}", value, values["step"])
        if write or evaluated or not self._bar.disable:
            self._show(values)
        if evaluated:
            self.say(f"step {line['step']} " + " ".join(f"{name} {value:.4f}" for name, value in evaluated.items()))

    def _show(self, values: dict[str, Any]) -> None:
        step, train_s = values["step"], max(values["train_s"], 1e-9)
        if self._began is None:  # after the first step, so that compilation is not in the rate
            self._began, self._rate_from = time.perf_counter(), step
        rate = (step - self._rate_from) / max(
            time.perf_counter() - self._began, 1e-9
        )  # steps per second of this process
        shown = {
            "loss": f"{values['loss']:.3f}",
            "kd_ratio": f"{values['kd_ratio']:.2f}",
            "samples/s": f"{rate * values['samples'] / step:.1f}",
            "teacher": f"{values['teacher_s'] / train_s:.0%}",
            "data": f"{values['data_s'] / train_s:.0%}",
        }
        if self._bar.disable:
            left = timedelta(seconds=round((self.steps - step) / rate)) if rate else "?"
            text = " ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{self.steps} {text} left {left}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def finish(self, stopped: str, **fields: Any) -> int:
        """Writes the run's result and closes its files; call on every rank, last. Returns the exit code.

        Args:
            stopped: "finished", "SIGTERM", "SIGINT", "max-minutes", "non-finite" or "corrupt-images".
        """
        self._teacher_costs()
        if self.writer:
            self._metrics.close()
            self._tensorboard.close()
            self._bar.close()
            last: dict[str, Any] = dict(*read_metrics(self.folder)[-1:])
            not_finite = [name for name, value in last.items() if isinstance(value, float) and not math.isfinite(value)]
            last |= dict.fromkeys(not_finite)  # null: JSON has no NaN
            self.update(result={**last, "stopped": stopped, **fields})
            print(f"{stopped}: {self.folder}", *(f"{k} {v}" for k, v in fields.items()), file=sys.stderr, flush=True)
        engine.leave()
        return {"SIGINT": 130, "non-finite": 1, "corrupt-images": 1}.get(stopped, 0)


def require_finite(teacher: str, score: dict[str, float]) -> None:
    """Raises ValueError naming `teacher` when its evaluation is not numbers."""
    if not all(map(math.isfinite, score.values())):
        shown = " ".join(f"{name} {value}" for name, value in score.items())
        raise ValueError(f"{teacher} answers with no finite numbers ({shown}); check its weights, or choose another")


def describe(recipe: str, config: Any) -> dict[str, Any]:
    """The head of run.json: what was asked for, and with what it runs."""
    cuda = torch.cuda.is_available()
    return {
        "recipe": recipe,
        "config": dataclasses.asdict(config),
        "argv": sys.argv,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": _commit(),
        "hardware": {
            "device": "cuda" if cuda else "cpu",
            "name": torch.cuda.get_device_name() if cuda else _cpu_name(),
            "count": torch.cuda.device_count() if cuda else os.cpu_count(),
        },
        "world_size": engine.world_size(),
    }


def _commit() -> str:
    """The commit of this code, "-dirty" with local changes; "unknown" for a copy without git."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
