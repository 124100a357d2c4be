"""What changes with the step: the learning rate and the distillation window. Pure functions, so resume needs no state.

Steps are optimizer steps counted from 0; `steps` is the length of the whole run.
"""

import math


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


def window_ratio(step: int, steps: int, *, ratio: float, start: float, stop: float) -> float:
    """Weight of the teacher term at `step`: `ratio` while start <= step / steps < stop, else 0.

    Source: arXiv 2211.00683 (for BERT, distilling only in the first 20 to 50 % of training is best).
    """
    return ratio if start * steps <= step < stop * steps else 0.0


def window_closed(step: int, steps: int, *, stop: float) -> bool:
    """Whether no step from `step` on distils, so that the teachers can go."""
    return step >= stop * steps
