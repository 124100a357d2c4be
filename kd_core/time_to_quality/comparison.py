"""Does distillation pay? Training seconds to equal quality, of runs without it and of runs with it.

    python -m kd_core.time_to_quality BASELINE_RUN... --against KD_RUN... [--metric eval/loss] [--out DIR]

For several target qualities: seconds, steps and samples of both arms, the speed-up with its interval over seeds, where
the time went, what the teachers' training cost apart, and a verdict. kd_core/time_to_quality/curves.py says how it is measured.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np

from kd_core import cli
from kd_core.runs import code
from kd_core.runs.flags import RunFlags
from kd_core.runs.folders import read_run
from kd_core.system.checked import read_json
from kd_core.teachers.flags import DistillFlags
from kd_core.teachers.sources import CACHE_PREFIX, counted
from kd_core.time_to_quality import report as time_to_quality_report
from kd_core.time_to_quality.curves import (
    CONFIDENCE,
    Curve,
    Reached,
    Run,
    at_shared_evaluations,
    learning_curve,
    log_interval,
    tradeoff_curve,
)

LOWER_IS_BETTER = dict.fromkeys(("eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/kl"), True)
LOWER_IS_BETTER |= dict.fromkeys(("eval/ece", "eval/calibration_error"), True)
LOWER_IS_BETTER |= dict.fromkeys(("eval/accuracy", "eval/top1", "eval/top5", "glue/average"), False)
LOWER_IS_BETTER |= dict.fromkeys(("eval/agreement", "eval/acceptance"), False)
ARMS = ("baseline", "against")

# Fields of `config` in which any two runs may differ, and those in which arms may besides: the method, the optimizer and
# the way of computing (the report names them). In all others runs must be alike, so that a new recipe's fields are
# compared without being listed here.
BOOKKEEPING = cli.FREE_ON_RESUME | {"seed", "steps"}
OF_A_RUN = BOOKKEEPING | {"teachers"}
OPTIMIZER = {"lr", "warmup_fraction", "decay_fraction", "clip", "weight_decay", "momentum", "adam_beta2", "dropout"}
COMPUTING = {
    "micro_batch_size",
    "deepspeed_config",
    "compile",
    "gradient_checkpointing",
    "fused_head",
    "softmax_axis",
    "logits_mib",
}
COMPUTING |= {"teacher_placement", "teacher_deepspeed_config", "teacher_ahead"}
METHOD = {field.name for field in dataclasses.fields(DistillFlags)} - {
    field.name for field in dataclasses.fields(RunFlags)
}
METHOD = METHOD - {"teachers"} - COMPUTING | {"teacher_dtype", "beta"}
OF_AN_ARM = OF_A_RUN | METHOD | OPTIMIZER | COMPUTING
# Below so many shared evaluations the report warns of the straight lines between them: a speed-up of 2 on a loss that
# falls as 1 / sqrt(steps) reads 1.85 to 1.99 with 8 of them, at the five targets.
ENOUGH_EVALUATIONS = 20
# Above this factor between two lengths the report says that a target between them is interpolated.
WIDE = 1.5
DRAWN = 60  # points of a curve in a figure


# --- runs -------------------------------------------------------------------------------------------------------------


def load(folder: Path, metric: str, *, lower_is_better: bool) -> Run:
    """Reads `config`, `hardware`, `world_size`, `result` and metrics.jsonl of a finished run.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the run is damaged, has not finished, or lacks the metric.
    """
    try:
        record, lines = read_run(folder)
        return _evaluated(folder, record, lines, metric, sign=1 if lower_is_better else -1)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no run (no {Path(error.filename).name}); leave it out") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} is no run of this project, or damaged ({what}); leave it out") from None


def _evaluated(folder: Path, record: dict[str, Any], lines: list[dict[str, Any]], metric: str, *, sign: int) -> Run:
    config, result = record["config"], record.get("result") or {"stopped": "no result yet"}
    if result.get("stopped", "finished") != "finished":
        raise ValueError(f"{folder} has not finished ({result['stopped']}); continue it with --resume, or leave it out")
    if not isinstance(config.get("teachers", []), list) or not isinstance(config.get("seed", 0), int | str):
        raise TypeError("config.teachers is no list, or config.seed no number")
    end = {**(lines[-1] if lines else {}), **result}
    if metric not in end:
        raise ValueError(f"{folder} has no {metric}; --metric must be one of {[name for name in end if '/' in name]}")
    steps = config.get("steps", end.get("step"))
    # An evaluation before the first counted step has no time to compare.
    points = [line for line in lines if metric in line and line["step"] < steps and line["train_s"] > 0]
    points.append(end | {"step": steps})
    quality = np.array([point[metric] for point in points], dtype=float)
    spent = np.array([_spent(point) for point in points], dtype=float)
    if not np.isfinite(quality).all() or not (spent[:, :2] > 0).all():
        raise ValueError(f"{folder} has a {metric} that is no number, or a train_s or step not above 0; leave it out")
    inside = [line.get("kd_ratio", 0) > 0 for line in lines]
    closes = 1 + max((i for i, within in enumerate(inside) if within), default=len(lines))
    told = "kd_ratio" in config or any("kd_ratio" in line for line in lines)
    return Run(
        folder,
        {name: record[name] for name in ("hardware", "world_size") if name in record} | config | {"steps": steps},
        sign * quality,
        spent,
        lines[closes]["train_s"] if closes < len(lines) else None,
        distils=config.get("kd_ratio", 0) > 0 or any(inside) if told else bool(config.get("teachers")),
        made_by={name: record[name] for name in ("recipe", "code", "commit") if name in record},
        data=record.get("data"),
    )


def _spent(line: dict[str, Any]) -> list[float]:
    named = ("train_s", "step", "samples", "teacher_s", "data_s")
    parts = (key for key in line if key.endswith("_s") and not key.endswith("_per_s") and key not in named)
    return [line.get(name, math.nan) for name in named] + [sum(line[part] for part in parts)]


def refuse_unlike(baseline: Sequence[Run], against: Sequence[Run], may_differ: Sequence[str] = ()) -> None:
    """Raises ValueError unless the runs differ only in what runs, or arms, may differ in."""
    folders = [run.folder.resolve() for run in [*baseline, *against]]
    twice = [folder for folder in folders if folders.count(folder) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; name each run once, in one arm")
    unknown = set(may_differ) - {name for run in [*baseline, *against] for name in run.fields}
    if unknown:
        raise ValueError(f"--may-differ {sorted(unknown)[0]}: no run has such a field; see `config` in run.json")
    for arm in (baseline, against):
        for run in arm[1:]:
            _refuse_pair(arm[0], run, OF_A_RUN.union(may_differ), "runs of one arm")
        told_apart: dict[Any, Path] = {}
        for run in arm:
            other = told_apart.setdefault((run.seed, run.length), run.folder)
            if other != run.folder:
                raise ValueError(f"{other} and {run.folder} have the same seed and length; keep one of them")
    _refuse_pair(baseline[0], against[0], OF_AN_ARM.union(may_differ), "the arms")


def _refuse_pair(one: Run, other: Run, free: frozenset[str], what: str) -> None:
    different = sorted(set(_differences(one, other)) - free)
    if different:
        name = different[0]
        values = " and ".join(repr(run.fields.get(name, "absent")) for run in (one, other))
        raise ValueError(
            f"{what} must have the same {name}: {one.folder} and {other.folder} have {values}; "
            f"leave one out, or add --may-differ {name} (to a study: may_differ) if it bears on neither quality nor time"
        )


def _differences(one: Run, other: Run) -> dict[str, list[Any]]:
    """Fields that two runs do not share, with both values, None where absent; what was moved is shared."""
    moved = {"data", "tokenizer"} if one.data is not None and one.data == other.data else set()
    return {
        name: [one.fields.get(name), other.fields.get(name)]
        for name in sorted((one.fields.keys() | other.fields.keys()) - moved)
        if (name in one.fields) != (name in other.fields) or one.fields[name] != other.fields[name]
    }


def teacher_costs(runs: Sequence[Run]) -> tuple[dict[str, float | None], list[str]]:
    """Training seconds of each distinct teacher that distils, None where unknown, and remarks on them."""
    folders: dict[Path, str] = {}
    for path in (path for run in runs if run.distils for path in run.fields.get("teachers", ()) if not counted(path)):
        folder = Path(path).resolve()
        folders.setdefault(folder.parent if folder.name == "hf" else folder, path)
    seconds: dict[str, float | None] = {}
    remarks = []
    for path in folders.values():
        try:
            trained, building = _origin(path)
            record = read_json(trained / "run.json")
            seconds[path] = building + float(record["result"]["train_s"])
            own = record.get("config", {}).get("kd_ratio", 0) and record["config"].get("teachers")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            seconds[path], record, own = None, {}, None
        if not 0 < (seconds[path] or 0) < math.inf:
            seconds[path] = None
            remarks.append(f"Teacher {path}: no run.json with a result there, so its training cost is unknown.")
        elif any(record.get(name) != runs[0].fields.get(name) for name in ("hardware", "world_size")):
            remarks.append(f"Teacher {path}: trained on other hardware than the runs, so its seconds are not theirs.")
        if own:
            remarks.append(f"Teacher {path}: distilled itself; the training of its own teachers is not counted.")
    if any(run.distils and not run.fields.get("teachers") for run in runs):
        seconds["unnamed"] = None
        remarks.append("A run distils and names no teachers, so their training cost is unknown.")
    return seconds, remarks


def _origin(path: str) -> tuple[Path, float]:
    """The run folder of a teacher, and the seconds that its cache took to build, 0 without one."""
    folder, building = Path(path), 0.0
    if path.startswith(CACHE_PREFIX):
        cache = Path(path.removeprefix(CACHE_PREFIX))
        folder = Path(read_json(cache / "header.json", teacher=str)["teacher"])
        building = float(read_json(cache / "build.json", seconds=Number)["seconds"])
    return folder.parent if folder.name == "hf" else folder, building


def direction(metric: str, lower_is_better: bool | None) -> bool:
    """Whether lower is better; raises ValueError for a metric that this file does not know and nobody explains."""
    if lower_is_better is not None:
        return lower_is_better
    if metric not in LOWER_IS_BETTER:
        raise ValueError(
            f"--metric {metric} is not known here: add --lower-is-better or --higher-is-better "
            "(to a study: lower_is_better, true or false)"
        )
    return LOWER_IS_BETTER[metric]


# --- report -----------------------------------------------------------------------------------------------------------


def report(
    baseline: Sequence[Path], against: Sequence[Path], *, out: Path | None = None, **asked: Any
) -> dict[str, Any]:
    """`compared`, printed, and written as report.json, report.md and two figures (PNG and SVG).

    Args:
        out: folder for the files; `report` beside the runs when None.
        asked: of `compared`.

    Raises:
        ValueError: a file as `out`; and what `compared` raises.
    """
    out = out or Path(os.path.commonpath([folder.resolve().parent for folder in [*baseline, *against]]), "report")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    study, drawn = compared(baseline, against, **asked)
    time_to_quality_report.write(study, drawn, out)
    print(time_to_quality_report.terminal(study))
    print(f"report: {out / 'report.md'}")
    return study


def compared(
    baseline: Sequence[Path],
    against: Sequence[Path],
    *,
    metric: str = "eval/loss",
    targets: Sequence[float] = (),
    lower_is_better: bool | None = None,
    may_differ: Sequence[str] = (),
    same_code: code.Same = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What finished runs spend to equal quality.

    Args:
        baseline: run folders of the arm without distillation, at least one.
        against: run folders of the arm with it, at least one.
        metric: a field of the runs' `result`.
        targets: qualities to reach; five spread over what both arms reach when empty.
        lower_is_better: needed for a metric that this file does not know.
        may_differ: fields of `config`, besides those known, in which runs may differ.
        same_code: of a study, which code was found to compute the same.

    Returns:
        What report.json holds, and what the figures show. Seconds are training seconds, without evaluation.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: runs that have not finished or cannot be compared, an unknown metric, a target that is no finite number.
    """
    if not all(map(math.isfinite, targets)):
        raise ValueError(f"--targets must be finite numbers, got {' '.join(map(str, targets))}")
    lower = direction(metric, lower_is_better)
    arms = [[load(folder, metric, lower_is_better=lower) for folder in arm] for arm in (baseline, against)]
    refuse_unlike(arms[0], arms[1], may_differ)
    of_code = code.mixed({str(run.folder): run.made_by for arm in arms for run in arm}, same_code)

    sign = 1 if lower else -1
    curves, notes = _curves(arms)
    wanted = [sign * target for target in targets] or _spread(list(curves.values()))
    rows = [_row(method, pair, target) for method, pair in curves.items() for target in wanted]
    if any(row["speedup"] and row["low"] is None for row in rows):
        notes.append("Fewer than two runs an arm at a length: the speed-up is a number without an interval.")
    study: dict[str, Any] = {"metric": metric, "lower_is_better": lower, "confidence": CONFIDENCE}
    drawn = {}
    for i, (name, arm) in enumerate(zip(ARMS, arms, strict=True)):
        own = {method: pair[i] for method, pair in curves.items()}
        reach = {method: _reach(curve, sign) for method, curve in own.items()}
        costs, remarks = teacher_costs(arm)
        study[name] = _summary(arm, costs) | {"reach": reach}
        notes += remarks
        drawn[name] = _drawn(arm, own, sign)
    apart = _differences(arms[0][0], arms[1][0])
    study["differences"] = {name: pair for name, pair in apart.items() if name not in BOOKKEEPING}
    computing = [f"{name} ({pair[0]}, {pair[1]})" for name, pair in apart.items() if name in COMPUTING]
    if computing:
        notes.append(f"The arms differ in {', '.join(computing)}: part of the speed-up may be due to that.")
    notes += [*_gaps(rows, sign), *of_code, *_crowded(arms)]
    study["observed"] = [pair | {"quality": sign * pair["quality"]} for pair in observed(*arms)]
    longest = max(run.length for run in arms[0])
    if all(pair["baseline_steps"] < longest for pair in study["observed"]):
        notes.append(f"No distilled length is as good in every seed as alone after {longest} steps, the longest.")
    study["targets"] = [row | {"target": sign * row["target"], "payback_runs": _payback(study, row)} for row in rows]
    study["notes"] = notes
    drawn["saved"] = {method: _saved(pair, sign) for method, pair in curves.items()}
    return study, drawn


def _summary(arm: Sequence[Run], costs: dict[str, float | None]) -> dict[str, Any]:
    return {
        "runs": [str(run.folder) for run in arm],
        "lengths": sorted({run.length for run in arm}),
        "seeds": list(dict.fromkeys(run.seed for run in arm)),
        "teacher_seconds": None if None in costs.values() else sum(cost or 0.0 for cost in costs.values()),
        "teachers": costs,
    }


def _reach(curve: Curve, sign: int) -> list[float] | None:
    """The easiest and the hardest quality, None where nothing is in reach."""
    return [_tidy(sign * curve.easiest), _tidy(sign * curve.hardest)] if curve.hardest <= curve.easiest else None


def _curves(arms: Sequence[Sequence[Run]]) -> tuple[dict[str, tuple[Curve, Curve]], list[str]]:
    """Both arms' curves by each method that the runs allow, the better method first, and what to know about them."""
    tradeoff, notes = _tradeoff_curves(arms)
    lengths = [{run.length for run in arm} for arm in arms]
    longest = [max(lengths[0] & lengths[1] or own) for own in lengths]
    chosen = [[run for run in arm if run.length == length] for arm, length in zip(arms, longest, strict=True)]
    shared = at_shared_evaluations([*chosen[0], *chosen[1]])
    count = len(shared[0].quality)
    if count < 2:
        notes.append("Too few evaluations for a learning curve: all runs share only the last (--eval-every).")
        if tradeoff:
            return tradeoff, notes
    else:
        notes.append(
            f"Learning curves: runs of {' and '.join(map(str, dict.fromkeys(longest)))} steps at the first crossing of "
            "the target, where the learning rate has not decayed; that flatters the arm that is earlier in its schedule."
        )
        if count < ENOUGH_EVALUATIONS:
            notes.append(
                f"Learning curves: only {count} evaluations are shared by all runs. The straight lines between them are "
                "late where a curve bends, the more the earlier the crossing, so a speed-up reads too close to 1."
            )
    learning = learning_curve(shared[: len(chosen[0])]), learning_curve(shared[len(chosen[0]) :])
    return tradeoff | {"learning": learning}, notes


def _tradeoff_curves(arms: Sequence[Sequence[Run]]) -> tuple[dict[str, tuple[Curve, Curve]], list[str]]:
    """The tradeoff curves, if the runs allow both."""
    slow, fast = (tradeoff_curve(arm) for arm in arms)
    if slow is None or fast is None:
        return {}, ["No tradeoff curve: it needs runs of two lengths (--steps) in both arms, the longer ones better."]
    return {"tradeoff": (slow, fast)}, []


def _spread(methods: Sequence[tuple[Curve, Curve]]) -> list[float]:
    """Five qualities, rounded, inside what both arms reach by the first method that has such; else between all ends."""
    for pair in methods:
        easiest, hardest = min(curve.easiest for curve in pair), max(curve.hardest for curve in pair)
        if hardest < easiest:
            break
    else:
        ends = [end for curve in pair for end in (curve.easiest, curve.hardest)]
        easiest, hardest = max(ends), min(ends)
    if easiest == hardest:
        return [easiest]
    inside = np.linspace(easiest, hardest, 7)[1:-1]
    return [round(float(target), 2 - math.floor(math.log10(easiest - hardest))) for target in inside]


def _row(method: str, curves: tuple[Curve, Curve], target: float) -> dict[str, Any]:
    slow, fast = (curve.at(target) if curve.hardest <= target <= curve.easiest else None for curve in curves)
    row: dict[str, Any] = {"target": target, "method": method}
    row |= {"baseline_s": slow and _tidy(math.exp(slow.means[0])), "against_s": fast and _tidy(math.exp(fast.means[0]))}
    row |= {"speedup": None, "straight": None, "low": None, "high": None, "verdict": "out of reach"}
    row |= {"baseline": slow and _detail(slow), "against": fast and _detail(fast), "saved": None, "gaps": {}}
    if slow is None or fast is None:
        return row
    row |= {"speedup": _tidy(math.exp(slow.means[0] - fast.means[0])), "verdict": "not decided"}
    row["saved"] = {
        "steps": row["baseline"]["steps"] - row["against"]["steps"],
        "s": row["baseline_s"] - row["against_s"],
    }
    ways = [(slow, fast)]
    if curves[0].straight and curves[1].straight:
        ways.append((curves[0].straight(target), curves[1].straight(target)))
        row["straight"] = _tidy(math.exp(ways[1][0].means[0] - ways[1][1].means[0]))
        around = {arm: curve.lengths(target) for arm, curve in zip(ARMS, curves, strict=True) if curve.lengths}
        row["gaps"] = {arm: list(pair) for arm, pair in around.items() if pair[1] > WIDE * pair[0]}
    intervals = [bounds for way in ways if (bounds := log_interval(*way))]
    if intervals:
        low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
        low, high = (_tidy(math.exp(np.clip(bound, -99, 99))) for bound in (low, high))
        row |= {"low": low, "high": high, "verdict": verdict(low, high)}
    return row


def _gaps(rows: Sequence[dict[str, Any]], sign: int) -> list[str]:
    """A sentence on each pair of lengths too far apart for what lies between them to be more than a guess."""
    within: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        for arm, (short, long) in row["gaps"].items():
            within.setdefault((arm, short, long), []).append(sign * row["target"])
    return [
        f"No run of the {time_to_quality_report.NAMES[arm]} arm is longer than {short} and shorter than {long} steps: the targets "
        f"{', '.join(f'{target:.6g}' for target in targets)} lie there. Their intervals hold the cubic and straight lines; runs in between would tell."
        for (arm, short, long), targets in within.items()
    ]


def _crowded(arms: Sequence[Sequence[Run]]) -> list[str]:
    """A sentence where runs had fewer cores than threads: each process computes in some, and makes batches in one more."""
    for run in (run for arm in arms for run in arm):
        machine, ranks = run.fields.get("hardware", {}), run.fields.get("world_size", 1)
        if machine.get("device") == "cpu" and (machine.get("count") or math.inf) <= ranks:
            return [
                f"{run.folder} had {machine['count']} core(s) for {ranks} process(es), each with a thread that makes batches: that "
                "thread's work is counted in what runs first in a step, the teacher's part if there is one, else the student's."
            ]
    return []


def observed(baseline: Sequence[Run], against: Sequence[Run]) -> list[dict[str, Any]]:
    """Pairs of lengths at which the one arm is as good as the other in every seed that both have: finished runs, no curve.

    Of each length of the baseline the shortest such of the other arm; where that is the same for several, the longest of the
    baseline's. The hardest first.
    """
    pairs: dict[int, dict[str, Any]] = {}
    for long in sorted({run.length for run in baseline}):
        theirs = {run.seed: run for run in baseline if run.length == long}
        for short in sorted({run.length for run in against}):
            ours = {run.seed: run for run in against if run.length == short and run.seed in theirs}
            if ours and all(run.quality[-1] <= theirs[seed].quality[-1] for seed, run in ours.items()):
                pairs[short] = _pair([theirs[seed] for seed in ours], list(ours.values()))
                break
    return sorted(pairs.values(), key=lambda pair: pair["quality"])


def _pair(slow: Sequence[Run], fast: Sequence[Run]) -> dict[str, Any]:
    seconds = [np.array([run.spent[-1, 0] for run in runs]) for runs in (slow, fast)]
    means = [float(np.log(each).mean()) for each in seconds]
    logs = [
        Reached(np.array([mean]), [dict(enumerate(np.log(each)))]) for mean, each in zip(means, seconds, strict=True)
    ]
    interval = log_interval(logs[0], logs[1])
    low, high = (_tidy(math.exp(bound)) for bound in interval) if interval else (None, None)
    return {
        "baseline_steps": slow[0].length,
        "against_steps": fast[0].length,
        "seeds": len(slow),
        "quality": _tidy(float(np.mean([run.quality[-1] for run in slow]))),
        "baseline_s": _tidy(math.exp(means[0])),
        "against_s": _tidy(math.exp(means[1])),
        "speedup": _tidy(math.exp(means[0] - means[1])),
        "low": low,
        "high": high,
    }


def verdict(low: float, high: float) -> str:
    """What an interval of the speed-up says."""
    return "faster" if low > 1 else "slower" if high < 1 else "not decided"


def _detail(arm: Reached) -> dict[str, Any]:
    seconds, steps, samples = np.exp(arm.means[:3])
    teacher, data, other = seconds * arm.means[3:]
    parts = {"student": seconds - teacher - data - other, "teacher": teacher, "data": data, "other": other}
    return {
        "steps": _tidy(steps),
        "samples": _tidy(samples),
        "seconds": {name: _tidy(part) for name, part in parts.items()},
    }


def _tidy(value: float) -> Any:
    """Six digits, so that equal arms are equal; None for nan, which JSON lacks."""
    return None if math.isnan(value) else float(f"{value:.6g}")


def _payback(study: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Student runs that pay back the teachers' training; None where distillation is not faster or a cost is unknown."""
    costs = [study[name]["teacher_seconds"] for name in ARMS]
    saved = row["verdict"] == "faster" and row["baseline_s"] - row["against_s"]
    return _tidy(max(0.0, costs[1] - costs[0]) / saved) if saved and None not in costs else None


def _drawn(arm: Sequence[Run], curves: dict[str, Curve], sign: int) -> dict[str, Any]:
    """What the figures show of an arm: its runs' evaluations, where their windows end, and each method's curve."""
    windows = [(run.window_s, run) for run in arm if run.window_s is not None]
    means = {}
    for method, curve in curves.items():
        targets = np.linspace(curve.easiest, curve.hardest, DRAWN if curve.hardest <= curve.easiest else 0)
        means[method] = [math.exp(curve.at(target).means[0]) for target in targets], sign * targets
    return {
        "runs": [(run.spent[:, 0], sign * run.quality) for run in arm],
        "windows": [(at, sign * np.interp(at, run.spent[:, 0], run.quality)) for at, run in windows],
        "curves": means,
    }


def _saved(curves: tuple[Curve, Curve], sign: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Qualities [K] within reach of both arms, steps and seconds saved to each [K, 2], the same by straight lines."""
    easiest, hardest = min(curve.easiest for curve in curves), max(curve.hardest for curve in curves)
    targets = np.linspace(easiest, hardest, DRAWN if hardest <= easiest else 0)

    def saved(ways: Sequence[Any]) -> np.ndarray:
        slow, fast = ([np.exp(way(target).means[[1, 0]]) for target in targets] for way in ways)
        return np.reshape(slow, (-1, 2)) - np.reshape(fast, (-1, 2))

    straight = [curve.straight for curve in curves]
    return sign * targets, saved([curve.at for curve in curves]), None if None in straight else saved(straight)


def main() -> None:
    parser = cli.OneLineParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("baseline", nargs="+", type=Path, help="run folders without distillation")
    parser.add_argument("--against", nargs="+", type=Path, required=True, help="run folders with distillation")
    parser.add_argument("--metric", default="eval/loss", help="a field of the runs' result (default: eval/loss)")
    parser.add_argument("--targets", nargs="+", type=float, default=(), help="qualities to reach (default: five)")
    parser.add_argument(
        "--out", type=cli.path, help="folder for report.json, report.md and figures (default: beside the runs)"
    )
    better = parser.add_mutually_exclusive_group()
    better.add_argument("--lower-is-better", action="store_true", default=None)
    better.add_argument("--higher-is-better", action="store_false", dest="lower_is_better")
    parser.add_argument("--may-differ", nargs="+", default=(), help="fields of config in which runs may differ besides")
    with cli.one_line_errors():
        report(**vars(parser.parse_args()))
