"""What a run writes down: run.json, metrics.jsonl, TensorBoard, a progress bar.

Only rank 0 writes; on the other ranks a `Run` does nothing. The layout of a run folder and the names in its files are
fixed: programs outside this project read them.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kd_core.runs.folders import read_metrics
from kd_core.system import ranks
from kd_core.system.clock import Stopwatch
from kd_core.system.files import write_atomic
from kd_core.teachers.flags import DistillFlags
from kd_core.teachers.pool import TeacherPool, require_finite
from kd_core.training.processes import leave


class Run:
    """The files and the terminal of one run. Make it on every rank; only rank 0's writes.

    Args:
        folder: the run folder, from `claim_folder`.
        steps: length of the run, for the progress bar.
        first: the checkpoint's step on resume, else 0; lines after it are dropped, so that each step appears once.
        record: fields of run.json to set, such as the data's fingerprint.
    """

    def __init__(self, folder: Path, cfg: DistillFlags, *, first: int = 0, **record: Any) -> None:
        self.folder, self.steps, self.first = folder, cfg.steps, first
        self._rate_from = first
        self._pool: TeacherPool | None = None
        self.writer = ranks.rank() == 0
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
        self, pool: TeacherPool, evaluate: Callable[[Any], dict[str, float]], clock: Stopwatch, *, chance_loss: float
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
            known = ranks.broadcast(self._record["teachers"] if self.writer else [])
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
        sizes = (ranks.total(torch.tensor(pool.device_bytes())) / ranks.world_size()).tolist()
        self.update(teachers=[one | {"device_bytes": int(size)} for one, size in zip(known, sizes, strict=True)])

    def _teacher_costs(self) -> None:
        """A line a teacher, over all ranks: how often it was asked, and what that took; also into run.json."""
        if self._pool is None or "teacher" not in self._clock.calls:
            return
        seconds, calls = self._clock.read(wait=True), self._clock.calls
        parts = [f"teacher/{index}" for index in range(len(self._pool.names))]
        mine = [(calls.get(part, 0), seconds.get(part, 0.0)) for part in parts] + [(1, seconds["train"])]
        *rows, (num_ranks, train_s) = ranks.total(torch.tensor(mine)).tolist()
        if not self.writer:
            return
        costs = [
            one | {"forwards": int(forwards), "seconds": took / num_ranks, "share": took / train_s if train_s else 0.0}
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
        leave()
        return {"SIGINT": 130, "non-finite": 1, "corrupt-images": 1}.get(stopped, 0)
