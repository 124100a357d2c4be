"""Arms of a study at equal steps: paired differences over seeds, what a step and a run cost, and a verdict on a claim.

    python -m kd_core.compare STUDY [--metric eval/loss] [--plot forest.png]

STUDY is the folder of a study, with study.json, runs.json and runs.csv (kd_core/runs/lean.py). For each of its lengths:

    value       mean over seeds of the metric in a run's last line, and their standard deviation
    difference  of two arms in the seeds that both have, with the interval of Student's t
    a step      training seconds over steps, as a multiple of the other arm's in the same seeds (geometric mean, interval of the
                logarithm); interleaved runs share the machine's drift
    memory      the most a process has held: on a GPU tensors, else all of the process
    seconds     of training in a run; what the teacher and its answers cost stands apart, once for all runs
    own part    of a step: neither teacher nor waiting for data. Where an arm differs from another in its teacher alone, it is the
                same work but for the loss, so it must take as long: within 2 %, or something else was measured too

Of several lengths it also says what an arm saves to be as good as the longest runs of the baseline, from finished runs alone: the
shortest length that is as good in every seed, steps times the cost of a step, and after how many such students the teacher and its
answers are paid back. Where the cost of a step, measured in runs that took turns, varies so much that less and more are both possible, the
seconds are not decided: the machine was too busy to tell.

A study's `claim` is that `arm` is better than `against`, after its longest runs:

    holds here      the difference's interval lies on the good side of zero
    contradicted    it lies on the bad side
    not shown       zero is inside; half of the interval's width says what could have been seen

The setting counts only if something can be seen there: where the study has an arm `kd`, plain distillation, that arm must
be better than the baseline with an interval that excludes zero, and the teacher better than the baseline's mean.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_core import cli
from kd_core.runs import code, lean
from kd_core.runs.design import Study, interleaved, read_study
from kd_core.system.terminal import aligned
from kd_core.time_to_quality.comparison import direction
from kd_core.time_to_quality.curves import CONFIDENCE, quantile
from kd_core.training.processes import end_process

ALIKE = 0.02  # within which the own part of a step is called the same
PLAIN = "kd"  # the arm of plain distillation, by its name
SHARES = ("accuracy", "top1", "top5")  # metrics in [0, 1] that are told in percent
COSTS = set(lean.COSTS)
HEAD = [
    "recipe",
    "setting",
    "metric",
    "method",
    "control",
    "difference",
    "a step",
    "GiB",
    "seconds",
    "verdict",
    "published",
]


@dataclass(frozen=True)
class Interval:
    """A mean over `count` seeds and its interval at `CONFIDENCE`, which a single seed has not (nan)."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    def told(self, digits: int, *, signed: bool = True) -> str:
        shown = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return shown if math.isnan(self.low) else f"{shown} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t on `values`, one a seed."""
    mean, count = float(np.mean(values)), len(values)
    half = quantile(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Interval(mean, mean - half, mean + half, count)


def ratio_interval(values: Sequence[float]) -> Interval:
    """Geometric mean of ratios, and the interval of its logarithm."""
    logs = mean_interval(np.log(values).tolist())
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.count)


def shown_as(metric: str) -> tuple[str, int, int]:
    """A metric's name with its unit, the factor to that unit, and digits."""
    return (f"{metric}, %", 100, 2) if metric.rpartition("/")[2] in SHARES else (metric, 1, 4)


@dataclass(frozen=True)
class Compared:
    """A study's runs of one length.

    Args:
        study: what was run.
        metric: what is compared, as the log names it.
        better: 1 where higher is better, else -1.
        steps: the length.
        values: by arm and seed the metric at the end, in the unit of `shown_as`.
        seconds: likewise, of training.
        own: likewise, without the teacher's and the wait for data; empty where a run does not say.
        memory: by arm, GiB, the most of its runs; None where they do not say.
        teachers: the metric of the teachers, by the runs' own evaluation.
        prepared: seconds of what was made before the runs, by name.
    """

    study: Study
    metric: str
    better: int
    steps: int
    values: dict[str, dict[int, float]]
    seconds: dict[str, dict[int, float]]
    own: dict[str, dict[int, float]]
    memory: dict[str, float | None]
    teachers: list[float]
    prepared: dict[str, float]

    def difference(self, arm: str, other: str) -> Interval:
        """Of `arm` less `other` in the seeds of both."""
        ours, theirs = self.values[arm], self.values[other]
        return mean_interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def cost(self, arm: str, other: str) -> Interval:
        """Seconds of `arm` as a multiple of those of `other` in the seeds of both."""
        ours, theirs = self.seconds[arm], self.seconds[other]
        return ratio_interval([ours[seed] / theirs[seed] for seed in ours if seed in theirs])

    def own_part(self, arm: str) -> Interval | None:
        """As a multiple of the baseline's; None where runs do not say, or the arm differs from it in more than a teacher."""
        study = self.study
        ours, theirs = self.own[arm], self.own[study.baseline]
        values = [ours[seed] / theirs[seed] for seed in ours if seed in theirs]
        same_recipe = study.arm(arm).recipe == study.arm(study.baseline).recipe
        return ratio_interval(values) if values and same_recipe and "--teachers" in study.arm(arm).flags else None

    def mean(self, arm: str) -> float:
        return float(np.mean(list(self.values[arm].values())))

    def side(self, difference: Interval) -> int:
        """1 where the interval lies on the good side of zero, -1 on the bad one, 0 where zero is inside."""
        return self.better * (int(difference.low > 0) - int(difference.high < 0))

    @property
    def shows_nothing(self) -> str:
        """Why nothing can be seen in this setting; empty where something can."""
        baseline = self.study.baseline
        if PLAIN in self.values and self.side(self.difference(PLAIN, baseline)) != 1:
            return f"`{PLAIN}` is not better than `{baseline}`"
        if (
            self.teachers
            and self.better * (max(self.teachers, key=lambda x: self.better * x) - self.mean(baseline)) <= 0
        ):
            return f"no teacher is better than `{baseline}`"
        return ""

    @property
    def verdict(self) -> str:
        """Of the claim: what the head of this file says, or that the setting shows nothing."""
        claim = self.study.claim
        assert claim is not None
        if self.shows_nothing:
            return f"does not count: {self.shows_nothing}"
        side = self.side(self.difference(claim["arm"], claim["against"]))
        return {1: "holds here", 0: "not shown", -1: "contradicted"}[side]


@dataclass(frozen=True)
class Saved:
    """What an arm needs to be as good as the longest runs of the baseline.

    Args:
        steps: of the arm's shortest length that is as good in every seed, and of the baseline's longest.
        cost: of a step, as a multiple of the baseline's: mean, smallest and largest over runs of the same seed and length.
        seconds: of training alone, and with the teacher at the mean cost.
        once: seconds of what was made before the runs.
    """

    steps: tuple[int, int]
    cost: tuple[float, float, float]
    seconds: tuple[float, float]
    once: float

    @property
    def share(self) -> list[float]:
        """Of the baseline's seconds: mean, smallest, largest."""
        return [self.steps[0] / self.steps[1] * cost for cost in self.cost]

    @property
    def verdict(self) -> str:
        _, low, high = self.share
        return "faster" if high < 1 else "slower" if low > 1 else "not decided"

    @property
    def students(self) -> int | None:
        """After how many the teacher is paid back; None where no seconds are saved."""
        saved = self.seconds[0] - self.seconds[1]
        return math.ceil(self.once / saved) if self.verdict == "faster" else None


def saved(study: Study, runs: Mapping[str, lean.Lean], arm: str, metric: str | None = None) -> Saved | None:
    """None where no length of the arm is as good in every seed."""
    baseline = study.baseline
    longest = compare(study, runs, max(study.arm(study.baseline).lengths), metric)
    at = {steps: compare(study, runs, steps, metric) for steps in sorted(study.arm(arm).lengths)}
    costs = [
        own.seconds[arm][seed] / own.seconds[baseline][seed]
        for own in at.values()
        for seed in own.seconds[arm].keys() & own.seconds.get(baseline, {}).keys()
    ]
    cost = (math.exp(float(np.mean(np.log(costs)))), min(costs), max(costs))
    theirs = longest.values[baseline]
    alone = float(np.mean(list(longest.seconds[baseline].values())))
    for steps, own in at.items():
        if all(own.better * (value - theirs[seed]) >= 0 for seed, value in own.values[arm].items() if seed in theirs):
            seconds = alone, alone * steps / longest.steps * cost[0]
            return Saved((steps, longest.steps), cost, seconds, sum(own.prepared.values()))
    return None


def told_saved(study: Study, runs: Mapping[str, lean.Lean], metric: str | None = None) -> str:
    """What every arm saves, as a table, and a sentence on each."""
    metric = metric or study.metric
    unit, _, digits = shown_as(metric)
    longest = compare(study, runs, max(study.arm(study.baseline).lengths), metric)
    goal = f"{study.baseline} after {longest.steps} steps, {unit} {longest.mean(study.baseline):.{digits - 1}f}, in every seed"
    rows = [["arm", f"{unit} then", "as good after", "a step costs, times", "seconds, times", "verdict"]]
    sentences = []
    for arm in study.arms:
        if arm == study.baseline:
            continue
        own = saved(study, runs, arm, metric)
        then = f"{longest.mean(arm):.{digits - 1}f}" if arm in longest.values else ""
        if own is None:
            rows.append([arm, then, "not reached", "", "", ""])
            continue
        cost, share = (f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in (own.cost, own.share))
        rows.append([arm, then, f"{own.steps[0]} steps", cost, share, own.verdict])
        told = f"{arm}: {own.steps[0]} steps in place of {own.steps[1]}, each {own.cost[0]:.2f} times as long"
        if own.verdict == "not decided":
            told += "; whether that is sooner, these runs cannot tell, or the machine was too busy"
        else:
            told += f": {own.seconds[1]:.0f} s of training in place of {own.seconds[0]:.0f}"
        if own.once:
            pays = f"paid back after {own.students} students" if own.students else "not paid back"
            told += f". The teacher and its answers took {own.once:.0f} s, once: {pays}"
        sentences.append(told + ".")
    return "\n".join([f"to be as good as {goal}:", *aligned(rows), *sentences, *mixed(study, runs)])


def compare(study: Study, runs: Mapping[str, lean.Lean], steps: int, metric: str | None = None) -> Compared:
    """The runs of `steps` steps, of the arms that have such.

    Raises:
        ValueError: an arm of these without a run of that length or without a seed of the baseline's, a run without the metric.
    """
    metric = metric or study.metric
    better = -1 if direction(metric, study.lower_is_better) else 1
    scale = shown_as(metric)[1]
    own = {arm: _of(runs, arm, steps) for arm in study.arms if steps in study.arm(arm).lengths}
    for arm, by_seed in own.items():
        if not by_seed:
            raise ValueError(
                f'arm "{arm}" has no run of {steps} steps yet; python -m kd_core.study runs what is missing'
            )
        if study.baseline in own and not by_seed.keys() & own[study.baseline].keys():
            raise ValueError(f'arm "{arm}" and the baseline "{study.baseline}" share no seed; only pairs are compared')
        for seed, run in by_seed.items():
            if math.isnan(run.end.get(metric, 0)):
                raise ValueError(
                    f"{arm}/{steps}/{seed} ended with a {metric} that is no number; take it out of runs.json"
                )
            if metric not in run.end:
                raise ValueError(f"--metric must be one of {[name for name in run.end if '/' in name]}, got {metric}")
    peaks = {
        arm: [run.record["result"].get("peak_memory_gib") for run in by_seed.values()] for arm, by_seed in own.items()
    }
    asked = [
        teacher for by_seed in own.values() for run in by_seed.values() for teacher in run.record.get("teachers", [])
    ]
    return Compared(
        study, metric, better, steps,
        values={arm: {seed: scale * run.end[metric] for seed, run in by_seed.items()} for arm, by_seed in own.items()},
        seconds={arm: {seed: run.end["train_s"] for seed, run in by_seed.items()} for arm, by_seed in own.items()},
        own={arm: {seed: _own(run.end) for seed, run in by_seed.items() if run.end.keys() >= COSTS} for arm, by_seed in own.items()},
        memory={arm: None if None in peaks[arm] else max(peaks[arm]) for arm in peaks},
        teachers=sorted({scale * teacher[metric] for teacher in asked if teacher.get(metric) is not None}),
        prepared={name: run.end["train_s"] for name, run in runs.items() if "/" not in name},
    )  # fmt: skip


def _own(end: Mapping[str, float]) -> float:
    return end["train_s"] - end["teacher_s"] - end["data_s"]


def _of(runs: Mapping[str, lean.Lean], arm: str, steps: int) -> dict[int, lean.Lean]:
    start = f"{arm}/{steps}/"
    return {int(name.removeprefix(start)): run for name, run in runs.items() if name.startswith(start)}


def told(study: Study, runs: Mapping[str, lean.Lean], metric: str | None = None) -> str:
    """All lengths, and what follows for the claim, for the terminal."""
    lengths = [_told(compare(study, runs, steps, metric)) for steps in study.shared_lengths]
    return "\n\n".join(
        [*lengths, *([told_saved(study, runs, metric)] if len(study.all_lengths) > 1 else mixed(study, runs))]
    )


def mixed(study: Study, runs: Mapping[str, lean.Lean]) -> list[str]:
    """`code.mixed` of the study's runs among `runs`."""
    names = [f"{arm}/{steps}/{seed}" for arm, steps, seed in interleaved(study)]
    return code.mixed({name: runs[name].record for name in names if name in runs}, study.same_code)


def _told(at: Compared) -> str:
    unit, _, digits = shown_as(at.metric)
    claim, baseline = at.study.claim, at.study.baseline
    others = [baseline, *([claim["against"]] if claim and claim["against"] != baseline else [])]
    rows = [
        ["arm", "seeds", "mean", "sd", *(f"less {other}" for other in others), f"a step, times {baseline}", "GiB", "s"]
    ]
    for arm, values in at.values.items():
        spread = f"{np.std(list(values.values()), ddof=1):.{digits}f}" if len(values) > 1 else ""
        cells = [arm, str(len(values)), f"{at.mean(arm):.{digits}f}", spread]
        cells += ["" if arm == other else at.difference(arm, other).told(digits) for other in others]
        cells.append("" if arm == baseline else at.cost(arm, baseline).told(2, signed=False))
        rows.append([*cells, _gib(at.memory[arm]), f"{np.mean(list(at.seconds[arm].values())):.0f}"])
    lines = [
        f"{unit}, {'higher' if at.better > 0 else 'lower'} is better, after {at.steps} steps; "
        f"differences in the same seeds, {CONFIDENCE:.0%} intervals",
        *aligned(rows),
    ]
    for arm in at.values:
        if arm != baseline and (part := at.own_part(arm)):
            apart = max(part.high, 1 / part.low) if part.count > 1 else math.nan
            verdict = "alike" if apart <= 1 + ALIKE else "not shown to be alike"
            lines.append(
                f"own part of a step, {arm}: {part.told(3, signed=False)} times that of {baseline}, {verdict} within {ALIKE:.0%}"
            )
    if at.teachers:
        lines.append(f"teacher {', '.join(f'{value:.{digits}f}' for value in at.teachers)}")
    if at.prepared:
        lines.append(
            "before the runs: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in at.prepared.items())
        )
    if claim and at.steps == max(at.study.shared_lengths):
        difference = at.difference(claim["arm"], claim["against"])
        lines += [
            f"verdict: {at.verdict}; {claim['arm']} less {claim['against']} {difference.told(digits)}"
            f"{'' if math.isnan(difference.half) else f', half-width {difference.half:.{digits}f}'}; "
            f"published: {claim['paper']}",
            f"criterion, written before: {claim['criterion']}",
            "| " + " | ".join(row(at)) + " |",
        ]
    return "\n".join(lines)


def _gib(peak: float | None) -> str:
    return "" if peak is None else f"{peak:.2f}"


def row(at: Compared) -> list[str]:
    """The study's row of the table of methods; its head is `HEAD`."""
    claim = at.study.claim
    assert claim is not None
    unit, _, digits = shown_as(at.metric)
    arm, other = claim["arm"], claim["against"]
    difference = at.difference(arm, other)
    verdict = at.verdict + (f" (± {difference.half:.{digits}f})" if at.verdict == "not shown" else "")
    once = sum(at.prepared.values())
    return [
        Path(at.study.arm(arm).recipe).stem, claim["setting"], unit,
        f"{at.mean(arm):.{digits}f}", f"`{other}` {at.mean(other):.{digits}f}", difference.told(digits),
        f"{at.cost(arm, other).told(2, signed=False)} of `{other}`", _gib(at.memory[arm]),
        f"{np.mean(list(at.seconds[arm].values())):.0f}" + (f" + {once:.0f} once" if once else ""), verdict, claim["paper"],
    ]  # fmt: skip


def forest(groups: Mapping[str, Sequence[tuple[str, Interval, int]]], unit: str) -> Any:
    """A figure of intervals, a line each, in groups.

    Args:
        groups: by heading (label, interval, 1 good, -1 bad, 0 not decided).
        unit: what the axis says.
    """
    from matplotlib.figure import Figure

    lines: list[tuple[str, Interval | None, int]] = []
    for heading, own in groups.items():
        lines += [(heading, None, 0), *own]
    figure = Figure(figsize=(7, 0.6 + 0.28 * len(lines)), layout="constrained")
    axes = figure.subplots()
    colours = {1: "#00798c", 0: "#777777", -1: "#d1495b"}
    for place, (_, interval, side) in enumerate(lines):
        if interval is not None:
            axes.plot([interval.low, interval.high], [place, place], color=colours[side], linewidth=2)
            axes.plot(interval.mean, place, "o", color=colours[side], markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [label for label, *_ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel(unit)
    return figure


def main() -> None:
    parser = cli.OneLineParser(prog="python -m kd_core.compare", description=__doc__.split("\n")[0])
    parser.add_argument(
        "study", type=cli.path, metavar="STUDY", help="folder of a study: study.json, runs.json, runs.csv"
    )
    parser.add_argument("--metric", help="default: the study's")
    parser.add_argument(
        "--plot", type=cli.path, metavar="FILE", help="all differences to the baseline as a forest plot, .png or .svg"
    )
    with cli.one_line_errors():
        args: argparse.Namespace = parser.parse_args()
        study, runs = read_study(args.study / "study.json"), lean.read(args.study)
        if not runs:
            raise FileNotFoundError(f"{args.study} has no runs.json; python -m kd_core.study {args.study} makes it")
        print(told(study, runs, args.metric))
        if args.plot:
            plot(study, runs, args.metric).savefig(args.plot, dpi=150)


def plot(study: Study, runs: Mapping[str, lean.Lean], metric: str | None = None) -> Any:
    """Every arm against the baseline, a group a length."""
    groups = {}
    for steps in study.shared_lengths:
        at = compare(study, runs, steps, metric)
        arms = [arm for arm in at.values if arm != study.baseline]
        pairs = [(arm, at.difference(arm, study.baseline)) for arm in arms]
        groups[f"after {steps} steps"] = [(arm, interval, at.side(interval)) for arm, interval in pairs]
    return forest(
        groups, f"{shown_as(metric or study.metric)[0]}: difference to {study.baseline}, {CONFIDENCE:.0%} intervals"
    )


if __name__ == "__main__":
    end_process(main)
