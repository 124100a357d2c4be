"""Learning rates as factors of the peak: pure functions of the step, so resume needs no state.

Steps are optimizer steps counted from 0; `steps` is the length of the whole run.
"""

import math

from kd_core.training.flags import TrainFlags


def linear_warmup_decay(
    step: int, steps: int, *, warmup_fraction: float, floor: float = 0.0, decay_fraction: float = 1.0
) -> float:
    """Learning-rate factor of `step`: linear from 1/warmup to 1, then linear to `floor` at the last step.

    Warm-up is a fraction of the run, so that it shrinks with it (Composer's fixed warm-up penalises short runs).

    Args:
        decay_fraction: of the run, at its end, in which the factor falls; before, it stays 1 from the warm-up on.

    Returns:
        A factor in (0, 1] of the peak learning rate.
    """
    warmup = round(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    falls = max(warmup, steps - round(decay_fraction * steps))
    return 1.0 - (1.0 - floor) * max(0, step + 1 - falls) / max(1, steps - falls)


def linear_warmup_cosine(step: int, steps: int, *, warmup_fraction: float, decay_fraction: float = 1.0) -> float:
    """Learning-rate factor of `step`: linear from 1/warmup to 1, then half a cosine down to 0 after the last step.

    Args:
        decay_fraction: as `linear_warmup_decay`.

    Returns:
        A factor in (0, 1] of the peak learning rate.
    """
    warmup = round(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    falls = max(warmup, steps - round(decay_fraction * steps))
    return 0.5 + 0.5 * math.cos(math.pi * max(0, step - falls) / max(1, steps - falls))


def cosine_lr(cfg: TrainFlags, step: int) -> float:
    """The learning rate of `step` by `linear_warmup_cosine`, from --lr, --warmup-fraction and --decay-fraction."""
    return cfg.lr * cosine(cfg, step)


def cosine(cfg: TrainFlags, step: int) -> float:
    """The factor of `cosine_lr`."""
    return linear_warmup_cosine(step, cfg.steps, warmup_fraction=cfg.warmup_fraction, decay_fraction=cfg.decay_fraction)
