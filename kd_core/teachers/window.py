"""When teachers answer, and how much of the loss is theirs: pure functions of the step, so resume needs no state.

Steps are optimizer steps counted from 0.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kd_core.runs.folders import check_folder
from kd_core.teachers.flags import DistillFlags, TeacherFlags
from kd_core.training import checkpoints


def first_step(fraction: float, steps: int) -> int:
    """The first step at or past `fraction` of a run: 0.55 of 100 is 55, although 0.55 * 100 is a little more in floats."""
    return math.ceil(round(fraction * steps, 6))


class Turn(NamedTuple):
    """A step's place among those at which teachers answer."""

    number: int  # steps that asked before this one
    of: int  # such steps in the whole run


def turn(cfg: TeacherFlags, step: int) -> Turn | None:
    """The step's turn; None where no teacher answers: outside the window, and between every so many-th step of it."""
    first, past = _bounds(cfg)
    number, off = divmod(step - first, cfg.window.every)
    if not (cfg.distils and first <= step < past and off == 0):
        return None
    return Turn(number, -(-(past - first) // cfg.window.every))


def _bounds(cfg: TeacherFlags) -> tuple[int, int]:
    """The first step of the window, and the first one past it."""
    return first_step(cfg.window.start, cfg.steps), first_step(cfg.window.stop, cfg.steps)


def closed(cfg: TeacherFlags, step: int) -> bool:
    """Whether no step from `step` on asks a teacher, so that they can go."""
    return not cfg.distils or step >= _bounds(cfg)[1]


def still_needed(cfg: TeacherFlags) -> bool:
    """Whether teachers are asked from where the run begins: it distils, and its newest checkpoint is in the window.

    Or at its end, and owes an evaluation, which may ask them.
    """
    if not (cfg.distils and cfg.resume):
        return cfg.distils
    folder = Path(cfg.out or "", "checkpoints")
    newest = next(reversed(checkpoints.checkpoint_names(folder)), None)
    step = checkpoints.step_of(newest)
    if newest and step == _bounds(cfg)[1]:
        try:
            step = checkpoints.steps_complete(checkpoints.read_state(folder / newest), step)
        except (ValueError, OSError):
            step -= 1  # damaged, so the run begins with an older one
    answered = check_folder(cfg).get("teachers", ())
    # A run that is older than fingerprints takes its masks from the caches themselves.
    known = answered and all("fingerprint" in one for one in answered)
    return not (known and closed(cfg, step))


class Mix(NamedTuple):
    """The weights of the two terms, and the temperature of the teachers'."""

    kd_ratio: float  # 0 where no teacher answers
    label_weight: float
    temperature: float

    def loss(self, terms: Mapping[str, float]) -> float:
        """Of the means `label_loss` and `kd_loss`, which `Step.update` gives."""
        return self.label_weight * terms["label_loss"] + self.kd_ratio * terms["kd_loss"]


def mix(cfg: DistillFlags, step: int) -> Mix:
    """From the window's first step to its last, `kd_ratio` goes to `kd_ratio_stop` and `temperature` to `temperature_stop`,
    where given, along `kd_ramp`.

    Source: arXiv 2211.00683 (for BERT, distilling only in the first 20 to 50 % of training is best).
    """
    if turn(cfg, step) is None:
        return Mix(0.0, cfg.label_weight_outside, cfg.temperature)
    first, past = _bounds(cfg)
    progress = (step - first) / max(1, past - first - 1)
    if cfg.kd_ramp == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    kd_ratio = _between(cfg.kd_ratio, cfg.kd_ratio_stop, progress)
    return Mix(kd_ratio, 1 - kd_ratio, _between(cfg.temperature, cfg.temperature_stop, progress))


def _between(start: float, stop: float | None, progress: float) -> float:
    # Equal ends are that value to the last bit: cached answers are found by their temperature.
    return start if stop in (None, start) else start * (1 - progress) + stop * progress
