"""Which teachers answer at a step: pure functions of (seed, step), so ranks agree without communication."""

from typing import Literal

import numpy as np

Sampler = Literal["uniform", "all"]


def draw_teachers(sampler: Sampler, num_teachers: int, *, seed: int, step: int) -> tuple[int, ...]:
    """Indices of the teachers that answer at `step`.

    `uniform` draws one at random, so a pool costs one forward a step whatever its size; for forward KL its expected
    gradient is that of the mean of the teachers' probabilities, because the gradient is linear in them. `all` is the
    whole ensemble at num_teachers forwards a step.

    Source: arXiv 2211.00683, section on ensembles (one sampled teacher a step in place of the full ensemble).
    """
    if sampler == "all":
        return tuple(range(num_teachers))
    return (int(np.random.default_rng([seed, step]).integers(num_teachers)),)
