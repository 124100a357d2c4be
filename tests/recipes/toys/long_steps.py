"""Steps of many micro-batches and evaluations of many batches, told to stop within: a recipe for the tests of the loop.

STOP_AT="step 2 batch 1" python long_steps.py --steps 6 --global-batch-size 16 --micro-batch-size 2
"""

import dataclasses
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kd_core.images.resnets import average_batch_norm
from kd_core.system.ranks import rank, total, world_size
from kd_core.training import stop
from kd_core.training.flags import TrainFlags
from kd_core.training.kept import Best
from kd_core.training.loop import Step, start
from kd_core.training.processes import end_process

stop.LOOK_SECONDS = 0.0  # after each batch


@dataclasses.dataclass(frozen=True)
class Config(TrainFlags):
    """Points of a line."""

    counts: bool = False
    """Whether the recipe keeps a number that changes within a step, which then cannot be given up."""


class Count:
    value = 0

    def state_dict(self) -> int:
        return self.value

    def load_state_dict(self, state: int) -> None:
        self.value = state


def reach(place: str) -> None:
    """Where STOP_AT says so, the last rank gets SIGTERM; with SECONDS_THEN all of its process group, and it takes that long."""
    if place == os.environ.get("STOP_AT") and rank() == world_size() - 1:
        if seconds := os.environ.get("SECONDS_THEN"):
            os.killpg(os.getpgrp(), signal.SIGINT)
            end = time.monotonic() + float(seconds)
            while time.monotonic() < end:
                time.sleep(0.1)
        else:
            os.kill(os.getpid(), signal.SIGTERM)


def train_step(cfg: Config, student: Any, count: Count, step: Step) -> None:
    batches = cfg.global_batch_size // (cfg.micro_batch_size * world_size())
    step.supervise(batches * cfg.micro_batch_size)
    points_B1 = torch.randn(batches * world_size(), cfg.micro_batch_size, 1, generator=step.random)[
        rank() :: world_size()
    ]
    for number, points in enumerate(points_B1):
        reach(f"step {step.number} batch {number}")
        count.value += cfg.counts
        step.backward(student, (student(points) - 3 * points).square().sum())
    step.update(student, lr=cfg.lr)


@torch.no_grad()
def evaluate(cfg: Config, student: Any, best: Best, number: int) -> dict[str, float]:
    student.eval()
    loss = torch.zeros(())
    for batch in stop.interruptible(range(4)):
        reach(f"evaluation {number} batch {batch}")
        loss += student(torch.full((2, 1), float(batch))).sum()
    scores = {"eval/score": total(loss).item()}
    return scores | {"eval/improves": float(best.improves({"eval/score": scores["eval/score"]}))}


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    with start(__file__, Config, typed, preset) as run:
        cfg = run.cfg
        run.prepare(lambda _: SimpleNamespace(fingerprint="line"))
        model = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        student = run.engine(model, torch.optim.AdamW(model.parameters(), lr=cfg.lr), after=average_batch_norm)
        best, count = Best("eval/score"), Count()
        run.keep(best=best, count=count)
        for step in run.steps(evaluate=lambda: evaluate(cfg, student, best, run.number)):
            train_step(cfg, student, count, step)
    return run.code


def forked(words: Sequence[str]) -> int:
    """The exit code of a run in a process of its own, that need not import anything any more."""
    child = os.fork()
    if not child:
        end_process(lambda: main(words))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_turn() -> int:
    """A whole run, then one that is stopped at each of the places in STOPS, kept as it is then, and resumed to its end."""
    places, words, again = os.environ["STOPS"].split(","), sys.argv[2:], []
    codes = [forked([*words, "--out", "whole"])]
    for place in [*places, ""]:
        os.environ["STOP_AT"] = place
        codes.append(forked([*words, "--out", "stopped", *again]))
        again = ["--resume"]
        if place and rank() == 0:
            shutil.copytree("stopped", f"stopped at {place}")
    return max(codes)


if __name__ == "__main__":
    end_process(in_turn if sys.argv[1:2] == ["in-turn"] else main)
