"""Which teachers answer at a step: pure functions of (seed, step) and where asked the rank.

So ranks agree without communication, and a resumed run needs no state.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Sampler = Literal["uniform", "weighted", "round_robin", "curriculum", "per_rank", "all"]


def draw_teachers(
    sampler: Sampler,
    num_teachers: int,
    *,
    seed: int,
    step: int,
    draws: int = 1,
    weights: Sequence[float] = (),
    turn: int = 0,
    turns: int = 1,
    rank: int = 0,
) -> tuple[int, ...]:
    """Indices, ascending, of the teachers that answer at `step`: a pool costs `draws` forwards a step whatever its size.

    `uniform` draws at random without replacement. For forward KL its expected gradient is that of the mean of all
    teachers' probabilities at the temperature, because the gradient is linear in them; for `mse` it is that of the mean
    of their logits. For reverse KL, and for any other divergence that is not linear in the teacher, it is neither's.
    `weighted` draws in proportion to `weights`, exactly so for one draw. `round_robin` takes turns. `curriculum` goes
    from the smallest weight to the largest over the run's turns. `per_rank` is `uniform` for each data-parallel rank by
    itself, so that one global batch meets several teachers. `all` is the whole ensemble.

    Args:
        draws: teachers a step, at most `num_teachers`; without meaning for `all`.
        weights: one a teacher, at least 0; of `weighted` and `curriculum`.
        turn, turns: distilling steps before this one, and in the whole run; of `round_robin` and `curriculum`.
        rank: of `per_rank`.

    Source: arXiv 2211.00683, section on ensembles (one sampled teacher a step in place of the full ensemble).
    """
    if sampler == "all":
        return tuple(range(num_teachers))
    if sampler == "round_robin":
        return tuple(sorted((turn * draws + i) % num_teachers for i in range(draws)))
    if sampler == "curriculum":
        weak_to_strong = sorted(range(num_teachers), key=lambda index: weights[index])
        first = turn * (num_teachers - draws + 1) // turns
        return tuple(sorted(weak_to_strong[first : first + draws]))
    generator = np.random.default_rng([seed, step, rank] if sampler == "per_rank" else [seed, step])
    if sampler != "weighted" and draws == 1:
        return (int(generator.integers(num_teachers)),)
    shares = None
    if sampler == "weighted":
        shares = np.divide(weights, max(weights))  # first, because a sum of large weights overflows
        shares /= shares.sum()
    return tuple(sorted(generator.choice(num_teachers, draws, replace=False, p=shares).tolist()))
