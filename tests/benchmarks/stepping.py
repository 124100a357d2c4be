"""A recipe's step with everything that the loop does around it, one at a time on batches that variants share."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_core.teachers.pool import TeacherPool
from kd_core.training.loop import Run


class Stepper:
    """Normalisation, checks, clock, agreement to stop, log: what a run of the recipe does, without its `main`."""

    def __init__(
        self,
        cfg: Any,
        folder: Path,
        train_step: Callable[..., None],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        teachers: Sequence[nn.Module] = (),
        *,
        columns: int,
        after: Callable[[nn.Module], Any] | None = None,
        **pool: Any,
    ) -> None:
        cfg = dataclasses.replace(cfg, out=str(folder))
        run = Run(Path(__file__), cfg, contextlib.ExitStack(), contextlib.ExitStack())
        run.prepare(lambda _: None)
        self._batch: Any = None
        student = run.engine(model, optimizer, after=after)
        held = TeacherPool(cfg, teachers, columns=columns, clock=run.clock, **pool)
        self._steps = run.steps(iter(lambda: self._batch, None))
        self._train = lambda step: train_step(cfg, student, held, step)

    def step(self, batch: Any) -> float:
        """The rest of the step before, then this one; returns its loss."""
        self._batch = batch
        step = next(self._steps)
        self._train(step)
        return float(step.line["loss"])
