"""Scores one random network a step, and trains none: a recipe without an engine.

Smoke:   python tests/recipes/toys/search.py --steps 4
"""

import dataclasses
import time
from collections.abc import Sequence

import torch

from kd_core.runs.flags import RunFlags
from kd_core.training.loop import start
from kd_core.training.processes import end_process


@dataclasses.dataclass(frozen=True)
class Config(RunFlags):
    """Searches the widest of random widths."""

    widest: int = 64
    """Largest width."""


class Best:
    """The best width so far."""

    width = 0

    def state_dict(self) -> int:
        return self.width

    def load_state_dict(self, state: int) -> None:
        self.width = state


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    with start(__file__, Config, typed, preset) as run:
        run.prepare(lambda _: None)
        best = Best()
        run.keep(best=best)
        for step in run.steps(evaluate=lambda: {"eval/width": float(best.width)}):
            width = int(torch.randint(1, run.cfg.widest, (), generator=step.random))
            time.sleep(0.1)  # what scoring one takes: long enough to be killed in
            best.width = max(best.width, width)
            step.log(width=width)
    return run.code


if __name__ == "__main__":
    end_process(main)
