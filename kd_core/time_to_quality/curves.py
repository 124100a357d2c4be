"""What an arm of runs spends to reach a quality, by two methods, and the interval of the ratio of two arms.

    tradeoff    Each arm has runs of several lengths, the schedule scaled to each. A length is a point: mean quality at
                the end, mean log seconds. Between lengths log seconds are a monotone cubic of quality, and straight besides:
                for a loss that falls as 1 / sqrt(seconds), lengths a factor two apart, the cubic is within 1 % and straight
                lines are 3 % too slow, but across a plateau neither is right, and what they differ by belongs to the interval.
    learning    The first crossing of the target within runs of one length, at the evaluations that the runs of both
                arms share. Between two of them seconds are linear in quality, which is late where a curve bends; arms
                evaluated at different steps would be late by different amounts. The learning rate is still high there;
                that flatters the arm earlier in its schedule.

Both curves are made to fall by averaging neighbours that are out of order, in quality as in seconds (isotonic
regression); a curve that never rises passes unchanged, and a quality that it holds for a while is reached when it first
has it. Nothing is extrapolated.

The interval is Student's t on the difference of mean log seconds, paired by seed where both arms have the same seeds,
Welch's otherwise. How far a run of the tradeoff curve moves its arm's log seconds at the target follows from the
curve's derivatives (the delta method); the runs of a seed move it together. A learning curve needs every run to reach
the target: a mean over those that do would leave out the slowest.

Source: tradeoff curves with rescaled schedules as in MosaicML's Composer (arXiv 2206.00832); PCHIP: Fritsch and Butland
1984, SIAM J. Sci. Stat. Comput. 5(2); the estimator is ours.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from scipy.interpolate import PchipInterpolator

CONFIDENCE = 0.95
# A group of runs, one a seed.
BySeed = dict[Hashable, float]


@dataclass(frozen=True)
class Run:
    """A finished run at its E evaluations, of which the last is its end.

    Args:
        folder: where it lies.
        fields: its `config`, and `hardware` and `world_size` besides.
        quality: [E], lower is better (the metric negated where higher is).
        spent: [E, 6], what it had cost by then: train_s, step, samples, teacher_s, data_s, seconds of other parts; nan
            where the run does not say.
        window_s: training seconds when the distillation window closed; None when it did not.
        distils: whether a teacher took part.
        made_by: of its run.json, what says by which code (kd_core/runs/code.py).
        data: the fingerprint of its data, wherever they lay; None where it does not say.
    """

    folder: Path
    fields: dict[str, Any]
    quality: np.ndarray
    spent: np.ndarray
    window_s: float | None
    distils: bool = False
    made_by: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None

    @property
    def length(self) -> int:
        return int(self.fields["steps"])

    @property
    def seed(self) -> Hashable:
        return self.fields.get("seed", str(self.folder))


@dataclass(frozen=True)
class Reached:
    """An arm at a target: `means` [6] as `log_costs` gives them, and the runs behind them.

    The log seconds vary as the sum, over the independent groups `by_seed`, of the groups' means.
    """

    means: np.ndarray
    by_seed: list[BySeed]


@dataclass(frozen=True)
class Curve:
    """An arm by one method, from the easiest to the hardest quality within its reach; the functions are defined between them.

    The hardest is easier than the easiest where the arm's runs share no quality: nothing is in reach.

    Args:
        at: what the arm spends to a quality.
        straight: of a tradeoff curve, the same with straight lines between lengths.
        lengths: of a tradeoff curve, the two lengths between whose ends a quality lies.
    """

    easiest: float
    hardest: float
    at: Callable[[float], Reached]
    straight: Callable[[float], Reached] | None = None
    lengths: Callable[[float], tuple[int, int]] | None = None


def log_costs(spent: np.ndarray) -> np.ndarray:
    """[..., 6]: log seconds, log steps, log samples; teacher, data and other parts as shares of the seconds."""
    return np.concatenate([np.log(spent[..., :3]), spent[..., 3:] / spent[..., :1]], axis=-1)


def falling_blocks(quality: np.ndarray) -> np.ndarray:
    """Bounds [K + 1] of the blocks of `quality` [E], up to its best value, whose means never rise.

    Isotonic regression by pooling adjacent violators. What follows the best value is left out, so that overfitting
    later does not undo what a run has reached.
    """
    blocks: list[tuple[float, int]] = []
    for value in quality[: int(quality.argmin()) + 1].tolist():
        mean, size = value, 1
        while blocks and blocks[-1][0] < mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return np.cumsum([0] + [size for _, size in blocks])


def block_means(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """[K, ...]: means of `values` [E, ...] over the blocks between `bounds` [K + 1]."""
    sizes = np.diff(bounds).reshape(-1, *[1] * (values.ndim - 1))
    return np.add.reduceat(values[: bounds[-1]], bounds[:-1]) / sizes


def at_shared_evaluations(runs: Sequence[Run]) -> list[Run]:
    """`runs` with only those of their evaluations that lie at a fraction of the run at which all have one."""
    fractions = [run.spent[:, 1] / run.length for run in runs]
    kept = [np.isin(own, functools.reduce(np.intersect1d, fractions)) for own in fractions]
    return [replace(run, quality=run.quality[at], spent=run.spent[at]) for run, at in zip(runs, kept, strict=True)]


def learning_curve(runs: Sequence[Run]) -> Curve:
    """First crossings within runs of one length; each of them reaches the curve's hardest quality."""
    smooth = {}
    for run in runs:
        bounds = falling_blocks(run.quality)
        smooth[run.seed] = block_means(run.quality, bounds)[::-1], block_means(run.spent, bounds)[::-1]

    def at(target: float) -> Reached:
        crossed = {
            # Among equal knots np.interp takes the last, here the earliest.
            seed: log_costs(np.array([np.interp(target, knots, column) for column in spent.T]))
            for seed, (knots, spent) in smooth.items()
        }
        return Reached(np.mean(list(crossed.values()), axis=0), [{seed: float(x[0]) for seed, x in crossed.items()}])

    return Curve(
        easiest=min(knots[-1] for knots, _ in smooth.values()),
        hardest=max(knots[0] for knots, _ in smooth.values()),
        at=at,
    )


def tradeoff_curve(runs: Sequence[Run]) -> Curve | None:
    """Quality at the end against what it cost, over an arm's lengths; None without two, the longer better."""
    lengths = sorted({run.length for run in runs})
    groups = [[run for run in runs if run.length == length] for length in lengths]
    ends = [np.array([[run.quality[-1], *log_costs(run.spent[-1])] for run in group]) for group in groups]
    middle = np.array([end.mean(axis=0) for end in ends])  # [lengths, 1 + 6]

    bounds = falling_blocks(middle[:, 0])
    knots = block_means(middle[:, 0], bounds)

    def at(target: float, between: Callable[[np.ndarray, np.ndarray, float], np.ndarray] = monotone_cubic) -> Reached:
        def costs(points: np.ndarray) -> np.ndarray:
            falling = block_means(points, falling_blocks(points[:, 0]))[::-1]
            return between(falling[:, 0], falling[:, 1:], target)

        slopes = gradient(lambda points: float(costs(points)[0]), middle[:, :2])
        by_seed = [
            {run.seed: float(slope @ end[:2]) for run, end in zip(group, own, strict=True)}
            for group, own, slope in zip(groups, ends, slopes, strict=True)
            if slope.any()
        ]
        return Reached(costs(middle), by_seed)

    def around(target: float) -> tuple[int, int]:
        block = int(np.argmax(knots <= target))  # the first that is as good
        here = lengths[bounds[block]]
        return (lengths[bounds[block] - 1] if knots[block] < target else here), here

    if knots[0] <= knots[-1]:
        return None
    return Curve(float(knots[0]), float(knots[-1]), at, functools.partial(at, between=straight_line), around)


def gradient(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Derivative of `function` in each element of `at` [K, C], by central differences of a millionth of its column."""
    spans = np.ptp(at, axis=0)
    sizes = 1e-6 * np.broadcast_to(np.where(spans > 0, spans, 1), at.shape)
    steps = np.diag(sizes.ravel()).reshape(at.size, *at.shape)
    return np.reshape([function(at + step) - function(at - step) for step in steps], at.shape) / (2 * sizes)


def monotone_cubic(x: np.ndarray, y: np.ndarray, at: float) -> np.ndarray:
    """[C]: at `at`, the cubics (PCHIP) through y [K, C] over rising x [K], which rise and fall only where y does.

    Where x repeats, y jumps: the cubics end there and begin anew, and `at` that x the last y counts.
    """
    pieces = np.split(np.arange(len(x)), np.flatnonzero(np.diff(x) == 0) + 1)
    piece = [piece for piece in pieces if x[piece[0]] <= at or piece[0] == 0][-1]
    x, y = x[piece], y[piece]
    if len(x) == 1:
        return y[0]
    return np.asarray(PchipInterpolator(x, y)(at))


def straight_line(x: np.ndarray, y: np.ndarray, at: float) -> np.ndarray:
    """As `monotone_cubic`, with straight lines."""
    return np.array([np.interp(at, x, column) for column in y.T])


def log_interval(baseline: Reached, against: Reached) -> tuple[float, float] | None:
    """The log speed-up's interval at `CONFIDENCE`; None when a group of runs is a single one."""
    groups = [*_one_group(baseline.by_seed), *_one_group(against.by_seed)]
    if len(groups) == 2 and groups[0].keys() == groups[1].keys():
        slow, fast = groups
        groups = [{seed: slow[seed] - fast[seed] for seed in slow}]
    counts = np.array([len(group) for group in groups])
    if counts.min() < 2:
        return None
    variances = np.array([np.var(list(group.values()), ddof=1) for group in groups]) / counts
    middle, variance = baseline.means[0] - against.means[0], variances.sum()
    half = 0.0
    if variance > 0:
        half = quantile(variance**2 / (variances**2 / (counts - 1)).sum()) * math.sqrt(variance)
    return middle - half, middle + half


def _one_group(groups: list[BySeed]) -> list[BySeed]:
    """The sum by seed where all groups have the same seeds: runs of one seed are not independent."""
    seeds = groups[0].keys()
    if any(group.keys() != seeds for group in groups):
        return groups
    return [{seed: sum(group[seed] for group in groups) for seed in seeds}]


def quantile(df: float) -> float:
    """The two-sided quantile of Student's t at `CONFIDENCE`."""
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, df))
