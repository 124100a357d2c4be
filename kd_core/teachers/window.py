"""The distillation window: when teachers answer, and how much of the loss is theirs.

Pure functions of the step, so resume needs no state. Steps are optimizer steps counted from 0.
"""

import math
from pathlib import Path
from typing import NamedTuple

from kd_core.runs.folders import check_folder
from kd_core.teachers.flags import DistillFlags
from kd_core.training import checkpoints


def first_step(fraction: float, steps: int) -> int:
    """The first step at or past `fraction` of a run: 0.55 of 100 is 55, although 0.55 * 100 is a little more in floats."""
    return math.ceil(round(fraction * steps, 6))


class Distillation(NamedTuple):
    """What the method does at a step."""

    kd_ratio: float  # weight of the teacher term; 0 where no teacher answers
    label_weight: float
    temperature: float
    turn: int  # steps that distilled before this one
    turns: int  # steps of the whole run that distil


def distillation(cfg: DistillFlags, step: int) -> Distillation:
    """The weights and the temperature of `step`.

    Teachers answer at every `kd_every`-th step of the window, which holds the steps with start <= step / steps < stop.
    From the window's first step to its last, `kd_ratio` goes to `kd_ratio_stop` and `temperature` to
    `temperature_stop`, where given, along `kd_ramp`.

    Source: arXiv 2211.00683 (for BERT, distilling only in the first 20 to 50 % of training is best).
    """
    first, past = first_step(cfg.kd_start, cfg.steps), first_step(cfg.kd_stop, cfg.steps)
    turn, off = divmod(step - first, cfg.kd_every)
    turns = -(-(past - first) // cfg.kd_every)
    if not (cfg.distils and first <= step < past and off == 0):
        return Distillation(0.0, cfg.label_weight_outside, cfg.temperature, turn, turns)
    progress = (step - first) / max(1, past - first - 1)
    if cfg.kd_ramp == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    kd_ratio = _between(cfg.kd_ratio, cfg.kd_ratio_stop, progress)
    return Distillation(kd_ratio, 1 - kd_ratio, _between(cfg.temperature, cfg.temperature_stop, progress), turn, turns)


def _between(start: float, stop: float | None, progress: float) -> float:
    # Equal ends are that value to the last bit: cached answers are found by their temperature.
    return start if stop in (None, start) else start * (1 - progress) + stop * progress


def window_closed(cfg: DistillFlags, step: int) -> bool:
    """Whether no step from `step` on distils, so that the teachers can go."""
    return not cfg.distils or step >= first_step(cfg.kd_stop, cfg.steps)


def needs_teachers(cfg: DistillFlags) -> bool:
    """Whether teachers are still asked: they distil, and the newest checkpoint of a resumed run is in their window."""
    if not (cfg.distils and cfg.resume):
        return cfg.distils
    steps = sorted(path.name for path in Path(cfg.out or "", "checkpoints").glob("step*"))
    answered = check_folder(cfg).get("teachers", ())
    # A run that is older than fingerprints takes its masks from the caches themselves.
    known = answered and all("fingerprint" in one for one in answered)
    return not (known and window_closed(cfg, checkpoints.step_of(steps[-1] if steps else None)))
