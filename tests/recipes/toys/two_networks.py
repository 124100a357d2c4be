"""A generator against a discriminator, each an engine, on ragged samples of their own: a recipe for the tests of the loop.

python two_networks.py --steps 8 --deepspeed-config zero2_fp32.json --any-number
"""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import softplus

from kd_core.system.ranks import rank, world_size
from kd_core.training.engine import frozen
from kd_core.training.flags import TrainFlags
from kd_core.training.loop import Step, start
from kd_core.training.processes import end_process


@dataclasses.dataclass(frozen=True)
class Config(TrainFlags):
    """Points in the plane."""

    any_number: bool = False
    """Engines of any number of backward passes; the discriminator then has two a micro-batch."""
    counted: bool = False
    """With --any-number: the discriminator's engine is told of its two."""
    mistake: str = ""
    """What to do wrong."""


class Share:
    """A number that follows the generator's loss."""

    value = 0.5

    def update(self, loss: float) -> None:
        self.value = 0.9 * self.value + 0.1 * loss

    def state_dict(self) -> float:
        return self.value

    def load_state_dict(self, state: float) -> None:
        self.value = state


class Unloadable(Share):
    def state_dict(self) -> Any:
        return np.float64(self.value)


def network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, outputs))


def train_step(cfg: Config, generator: Any, judge: Any, share: Share, step: Step) -> None:
    # Of the step alone in all, so that 1 rank and 2 ranks see the same points.
    lengths = torch.randint(1, 5, (cfg.global_batch_size,), generator=step.random).tolist()
    points = [torch.randn(3, length, 2, generator=step.random) for length in lengths]
    own, parts = points[rank() :: world_size()], lengths[rank() :: world_size()]
    if cfg.mistake == "set rows":
        step.rows = torch.tensor(1.0)
    step.supervise(sum(parts))
    for noise, more, shift in own:
        with torch.no_grad():
            fake = generator(noise)
        real = softplus(-judge(0.1 * shift + 2)).sum()
        if cfg.any_number:
            step.backward(judge, real, real=real)
            step.backward(judge, softplus(judge(fake)).sum())
        else:
            step.backward(judge, real + softplus(judge(fake)).sum(), real=real)
        if cfg.mistake == "two backwards":
            step.backward(judge, softplus(judge(more)).sum())
        if cfg.mistake == "late rows":
            step.supervise(3)
    step.update(judge, lr=cfg.lr)
    for noise, more, _ in own:
        with frozen(judge) as module:
            loss = softplus(-module(generator(noise))).sum()
        if cfg.mistake == "unfrozen":
            loss = softplus(-judge(generator(more))).sum()
        if cfg.mistake == "unfrozen module":
            loss = softplus(-judge.module(generator(more))).sum()
        if cfg.mistake == "other parameters":  # of one size, so that their reductions are taken for one another
            loss = generator.module[2 * rank()].weight.sum()
        terms = {"other" if rank() and cfg.mistake == "other terms" else "term": share.value * loss.detach()}
        if cfg.mistake == "taken name":
            terms["loss"] = loss
        step.backward(generator, loss.expand(2) if cfg.mistake == "no scalar" else loss, **terms)
        step.count(points=len(noise))
    if cfg.mistake == "no update":
        return
    if cfg.mistake == "twice":
        step.update(generator, lr=cfg.lr)
    share.update(step.update(generator, lr=cfg.lr)["loss"])
    step.log(share=share.value)


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    with start(__file__, Config, typed, preset) as run:
        cfg = run.cfg
        run.prepare(lambda _: SimpleNamespace(fingerprint="points"))
        first, second = network(2), network(1)
        backwards = None if cfg.any_number else 1
        generator = run.engine(first, torch.optim.AdamW(first.parameters(), lr=cfg.lr), backwards=backwards)
        adamw = torch.optim.AdamW(second.parameters(), lr=cfg.lr)
        backwards = 2 if cfg.counted else backwards
        judge = run.engine(second, adamw, name="judge", backwards=backwards)
        if cfg.mistake == "other buffers":
            second.register_buffer("number", torch.tensor(float(rank())))
        share: Share = Unloadable() if cfg.mistake == "unloadable" else Share()
        run.keep(share=share)
        for step in run.steps(evaluate=lambda: {"eval/loss": share.value}):
            train_step(cfg, generator, judge, share, step)
            if cfg.mistake == "break":
                break
    return run.code


if __name__ == "__main__":
    end_process(main)
