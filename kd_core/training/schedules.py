"""Learning rates as factors of the peak: pure functions of the step, so resume needs no state.

Steps are optimizer steps counted from 0; `steps` is the length of the whole run.
"""

import math

from kd_core.training.flags import TrainFlags


def linear_warmup_decay(step: int, steps: int, *, warmup_fraction: float, floor: float = 0.0) -> float:
    """Learning-rate factor of `step`: linear from 1/warmup to 1, then linear to `floor` at the last step.

    Warm-up is a fraction of the run, so that it shrinks with it (Composer's fixed warm-up penalises short runs).

    Returns:
        A factor in (0, 1] of the peak learning rate.
    """
    warmup = round(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - (1.0 - floor) * (step + 1 - warmup) / max(1, steps - warmup)


def linear_warmup_cosine(step: int, steps: int, *, warmup_fraction: float) -> float:
    """Learning-rate factor of `step`: linear from 1/warmup to 1, then half a cosine down to 0 after the last step.

    Returns:
        A factor in (0, 1] of the peak learning rate.
    """
    warmup = round(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def cosine_lr(cfg: TrainFlags, step: int) -> float:
    """The learning rate of `step` by `linear_warmup_cosine`, from --lr and --warmup-fraction."""
    return cfg.lr * linear_warmup_cosine(step, cfg.steps, warmup_fraction=cfg.warmup_fraction)
