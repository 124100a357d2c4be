"""Two stages, each a run: a line is fitted, then another on what the first has found.

Smoke:   python tests/recipes/toys/stages.py --steps 4
Kill:    --steps 600 --save-every 100 --log-every 50 --eval-every 300
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from kd_core import cli
from kd_core.runs import chain
from kd_core.runs.flags import RunFlags
from kd_core.training.loop import start
from kd_core.training.processes import end_process


@dataclasses.dataclass(frozen=True)
class Config(RunFlags):
    """One recipe, two kinds of run."""

    stage: Literal["all", "first", "second"] = "all"
    """What this run is."""
    student: str = ""
    """Run folder of the first stage."""
    lr: float = 0.1
    """Of both."""


STAGES = {"one": "--stage first", "two": "--stage second --student {one}"}


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    with cli.one_line_errors():
        stage = cli.parse(Config, typed, preset).stage
    if stage == "all":
        return chain.run(__file__, Config, typed, STAGES)
    with start(__file__, Config, typed, preset) as run:
        run.prepare(lambda _: None)
        line = nn.Linear(4, 1)
        if run.cfg.student:
            line.load_state_dict(torch.load(Path(run.cfg.student) / "line.pt", weights_only=True))
        engine = run.plain_engine(line, torch.optim.SGD(line.parameters(), lr=run.cfg.lr))
        for step in run.steps(evaluate=lambda: {"eval/loss": float(line.weight.square().sum())}):
            inputs = torch.randn(16, 4, generator=step.random)
            step.backward(engine, (engine(inputs)[:, 0] - inputs.sum(-1)).square().mean())
            step.update(engine, lr=run.cfg.lr)
        torch.save(line.state_dict(), run.folder / "line.pt")
    return run.code


if __name__ == "__main__":
    end_process(main) if "--stage" in sys.argv else sys.exit(main())
