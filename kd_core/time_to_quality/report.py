"""How a comparison is told: a table on the terminal, report.md, report.json, and two figures.

Takes the dictionary that `comparison.report` makes, and knows nothing of how it was measured.
"""

import json
import math
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from kd_core.system.terminal import aligned, markdown_table

METHODS = {"tradeoff": "Tradeoff curve", "learning": "Learning curve"}
NAMES = {"baseline": "baseline", "against": "distilled"}
EXPLANATION = (
    "- Speed-up: seconds of the baseline over seconds of the distilled arm, at equal quality. *faster*: its interval is "
    "above 1; *slower*: below 1; *not decided*: it contains 1, or there is none. Each interval is for one target.",
    "- Tradeoff curve: several lengths an arm, the schedule scaled to each, quality at the end; between lengths a cubic "
    "and, beside it, straight lines, and the interval holds both. Learning curve: the "
    "first crossing of the target within a run, at the evaluations that all runs share; every run must reach it. "
    "Nothing is extrapolated: what an arm does not reach is *out of reach*.",
    "- Student seconds are all that is neither teacher nor waiting for data: forward, backward, optimizer. Teachers' "
    "forwards are counted, their training stands apart.",
)
OBSERVED = "Of finished runs, the shortest distilled ones that are as good as those alone in every seed:"
COLOURS = {"baseline": "#444444", "against": "#d1495b", "tradeoff": "#00798c", "learning": "#edae49"}
LABEL_HEIGHT = 0.025  # of a target's label, as a share of the axes


def headline(study: dict[str, Any]) -> str:
    """The verdict in a sentence or two, by the method that judges."""
    method, rows = _judge(study)
    counts = Counter(row["verdict"] for row in rows)
    told = ", ".join(f"{verdict} at {count}" for verdict, count in counts.most_common())
    sentences = [_observed_sentence(study)] if study["observed"] else []
    sentences.append(f"Distillation: {told} of {len(rows)} targets ({METHODS[method].lower()}).")
    best = min if study["lower_is_better"] else max
    hardest = best((row for row in rows if row["speedup"]), key=lambda row: row["target"], default=None)
    if hardest:
        interval = f" ({_percent(study)} interval {_interval(hardest)})" if hardest["low"] is not None else ""
        sentences.append(
            f"At {study['metric']} {hardest['target']:.6g}, the hardest in reach, {_seconds(hardest['against_s'])} s "
            f"instead of {_seconds(hardest['baseline_s'])} s: {hardest['speedup']:.3g} times as fast{interval}."
        )
    reaches = [(name, study[arm]["reach"][method]) for arm, name in NAMES.items()]
    ends = [f"{name} {reach[1]:.5g}" if reach else f"{name} nothing by all of its runs" for name, reach in reaches]
    sentences.append(f"Best reached: {', '.join(ends)}.")
    if method != study["targets"][0]["method"]:
        sentences.append("No target is in reach of both tradeoff curves.")
    return " ".join(sentences)


def _observed_sentence(study: dict[str, Any]) -> str:
    """The pair of the hardest quality; finished runs alone are behind it."""
    pair = study["observed"][0]
    seeds = f"in {pair['seeds']} of {pair['seeds']} seeds" if pair["seeds"] > 1 else "in one seed"
    return (
        f"Observed: distilled after {pair['against_steps']} steps is as good as alone after {pair['baseline_steps']} "
        f"({study['metric']} {pair['quality']:.4g}) {seeds}, {_times(pair)} times as fast."
    )


def _times(row: dict[str, Any]) -> str:
    return f"{row['speedup']:.3g}" + ("" if row["low"] is None else f" ({_interval(row)})")


def _observed(study: dict[str, Any]) -> list[list[str]]:
    """Pairs of finished runs of which the distilled are as good in every seed."""
    head = [
        f"alone: steps, {study['metric']}",
        "distilled: steps",
        "steps saved",
        "baseline s",
        "distilled s",
        "times as fast",
    ]
    return [head] + [
        [
            f"{pair['baseline_steps']}, {pair['quality']:.4g}",
            str(pair["against_steps"]),
            str(pair["baseline_steps"] - pair["against_steps"]),
            _seconds(pair["baseline_s"]),
            _seconds(pair["against_s"]),
            _times(pair),
        ]
        for pair in study["observed"]
    ]


def terminal(study: dict[str, Any]) -> str:
    """The verdict, then a table a method, the teachers' cost, and the notes."""
    lines = [headline(study)]
    if study["observed"]:
        lines += ["", OBSERVED, *aligned(_observed(study))]
    for method, rows in _by_method(study):
        lines += ["", f"{METHODS[method]}: training seconds to {study['metric']} ({_direction(study)})"]
        lines += [*aligned(_rows(study, rows)), _reach(study, method)]
    return "\n".join([*lines, "", *(f"- {note}" for note in [_teachers(study), *study["notes"]])])


def markdown(study: dict[str, Any]) -> str:
    """report.md."""
    lines = [f"# Time to equal {study['metric']}", "", f"**{headline(study)}**", ""]
    lines += ["![quality against training seconds](quality.svg)", "", "![speed-up against target](speedup.svg)", ""]
    lines += ["![steps and seconds saved against quality](saved.svg)", ""]
    lines += ["## What was compared", ""]
    lines += markdown_table(
        [["arm", "runs", "steps", "seeds", "teachers' training seconds"]]
        + [
            [
                NAMES[arm],
                str(len(study[arm]["runs"])),
                " ".join(map(str, study[arm]["lengths"])),
                " ".join(map(str, study[arm]["seeds"])),
                _seconds(study[arm]["teacher_seconds"]).replace("-", "unknown"),
            ]
            for arm in NAMES
        ]
    )
    lines += ["", "Where the first runs of the arms differ:", ""]
    differences = [[name, *map(str, pair)] for name, pair in study["differences"].items()]
    lines += markdown_table([["flag", *NAMES.values()], *differences])
    if study["observed"]:
        lines += ["", "## Observed", "", OBSERVED, "", *markdown_table(_observed(study))]
    for method, rows in _by_method(study):
        lines += [
            "",
            f"## {METHODS[method]}",
            "",
            f"{study['metric']}: {_direction(study)}. Seconds are of training. {_reach(study, method)}",
            "",
        ]
        lines += markdown_table(_rows(study, rows))
        lines += ["", "What it took, and where the time went (seconds):", ""]
        lines += markdown_table(_parts(rows))
    lines += ["", "## Notes", "", *(f"- {note}" for note in [_teachers(study), *study["notes"]]), ""]
    return "\n".join([*lines, *EXPLANATION, ""])


def _rows(study: dict[str, Any], rows: list[dict[str, Any]]) -> list[list[str]]:
    head = [
        "target",
        "baseline s",
        "distilled s",
        "speed-up",
        "straight lines",
        f"{_percent(study)} interval",
        "steps saved",
        "verdict",
        "paid back after",
    ]
    return [head] + [
        [
            f"{row['target']:.6g}",
            _seconds(row["baseline_s"]),
            _seconds(row["against_s"]),
            f"{row['speedup']:.3g}" if row["speedup"] else "-",
            f"{row['straight']:.3g}" if row["straight"] else "-",
            _interval(row),
            f"{row['saved']['steps']:,.0f}" if row["saved"] else "-",
            row["verdict"],
            f"{math.ceil(row['payback_runs'])} runs" if row["payback_runs"] else "-",
        ]
        for row in rows
    ]


def _parts(rows: list[dict[str, Any]]) -> list[list[str]]:
    told = [["target", "arm", "steps", "samples", "student", "teacher", "data", "other"]]
    for row in rows:
        for arm, name in NAMES.items():
            if row[arm]:
                counts = [f"{row[arm][count]:,.0f}" if row[arm][count] else "-" for count in ("steps", "samples")]
                told.append([f"{row['target']:.6g}", name, *counts, *map(_seconds, row[arm]["seconds"].values())])
    return told


def _teachers(study: dict[str, Any]) -> str:
    cost, paths = study["against"]["teacher_seconds"], ", ".join(study["against"]["teachers"])
    if not paths:
        return "The distilled arm has no teacher."
    took = "" if cost is None else f"; it took {_seconds(cost)} s, once"
    return f"The teachers' training ({paths}) is not counted in the speed-up{took}."


def _by_method(study: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    rows = [(method, [row for row in study["targets"] if row["method"] == method]) for method in METHODS]
    return [(method, own) for method, own in rows if own]


def _judge(study: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The first method by which a target is in reach of both arms, and its rows."""
    methods = _by_method(study)
    return next((pair for pair in methods if any(row["speedup"] for row in pair[1])), methods[0])


def _reach(study: dict[str, Any], method: str) -> str:
    reaches = [(name, study[arm]["reach"][method]) for arm, name in NAMES.items()]
    told = [f"{name} {'from {:.5g} to {:.5g}'.format(*reach) if reach else 'nothing'}" for name, reach in reaches]
    return f"In reach: {', '.join(told)}."


def _percent(study: dict[str, Any]) -> str:
    return f"{study['confidence']:.0%}".replace("%", " %")


def _direction(study: dict[str, Any]) -> str:
    return f"{'lower' if study['lower_is_better'] else 'higher'} is better"


def _interval(row: dict[str, Any]) -> str:
    return "-" if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# --- files ------------------------------------------------------------------------------------------------------------


def write(study: dict[str, Any], drawn: dict[str, dict[str, Any]], out: Path) -> None:
    """Writes the report's files into `out`, each complete or absent, report.json last.

    Args:
        study: what report.json holds.
        drawn: of each arm, `runs` and, by method, `curves`, as (seconds, quality); `windows`, where teachers left. By method
            `saved`: qualities [K], steps and seconds saved to them [K, 2], and the same by straight lines, or None.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as hidden:
        figures = {"quality": _quality_figure(study, drawn), "speedup": _speedup_figure(study)}
        figures["saved"] = _saved_figure(study, drawn)
        for name, figure in figures.items():
            figure.savefig(Path(hidden, f"{name}.png"), dpi=150)
            with matplotlib.rc_context({"svg.hashsalt": name}):  # the same runs, the same bytes
                figure.savefig(Path(hidden, f"{name}.svg"), metadata={"Date": None})
        Path(hidden, "report.md").write_text(markdown(study))
        Path(hidden, "report.json").write_text(json.dumps(study, indent=2, allow_nan=False) + "\n")
        for name in (
            *(f"{figure}.{kind}" for figure in figures for kind in ("png", "svg")),
            "report.md",
            "report.json",
        ):
            os.replace(Path(hidden, name), out / name)


def _quality_figure(study: dict[str, Any], drawn: dict[str, dict[str, Any]]) -> Figure:
    method, rows = _judge(study)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for arm in NAMES:
        data = drawn[arm]
        colour, windows = COLOURS[arm], data["windows"]
        for seconds, quality in data["runs"]:
            axes.plot(seconds, quality, color=colour, linewidth=0.8, alpha=0.4)
            axes.plot(seconds[-1], quality[-1], "o", color=colour, markersize=4, alpha=0.6)
        axes.plot(
            *data["curves"][method], color=colour, linewidth=3, label=f"{NAMES[arm]}: mean {METHODS[method].lower()}"
        )
        axes.plot(
            [], [], "-o", color=colour, linewidth=0.8, markersize=4, alpha=0.6, label=f"{NAMES[arm]}: each run, its end"
        )
        if windows:
            axes.plot(
                *zip(*windows, strict=True), "v", color=colour, markersize=6, label=f"{NAMES[arm]}: teacher leaves"
            )
    targets = [row["target"] for row in rows]
    # The first evaluations are far from every target: they may leave the picture.
    qualities = np.concatenate([quality for arm in NAMES for _, quality in drawn[arm]["runs"]] + [targets])
    better = -1 if study["lower_is_better"] else 1
    best, easiest = better * max(better * qualities), better * min(better * np.array(targets))
    span = abs(best - easiest) or 1.0
    low, high = sorted((best + 0.05 * better * span, easiest - 0.6 * better * span))
    axes.set_ylim(low, high)
    height = 0.0
    for row in sorted(rows, key=lambda row: row["target"]):
        axes.axhline(row["target"], color="#888888", linewidth=0.8, linestyle=":")
        told = f"{row['target']:.6g}: " + (f"{row['speedup']:.2f} x" if row["speedup"] else "out of reach")
        height = max(height + LABEL_HEIGHT, (row["target"] - low) / (high - low))  # of targets close together too
        axes.annotate(
            told, (1, height), xycoords="axes fraction", xytext=(4, -3), textcoords="offset points", fontsize=8
        )
    axes.set(
        title=f"Quality against time; dotted: targets, with the speed-up ({METHODS[method].lower()})",
        xlabel="training seconds (teachers' forwards counted, their training not)",
        ylabel=f"{study['metric']} ({_direction(study)})",
    )
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    return figure


def _speedup_figure(study: dict[str, Any]) -> Figure:
    targets = sorted({row["target"] for row in study["targets"]}, reverse=study["lower_is_better"])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    shown = [1.0]
    for shift, (method, rows) in enumerate(_by_method(study)):
        reached = [row for row in rows if row["speedup"]]
        if not reached:
            continue
        at = [targets.index(row["target"]) + 0.16 * shift for row in reached]
        speedups = [row["speedup"] for row in reached]
        shown += speedups
        axes.plot(at, speedups, "o", color=COLOURS[method], markersize=7, label=METHODS[method])
        bars = [(x, row["low"], row["high"]) for x, row in zip(at, reached, strict=True) if row["low"] is not None]
        if bars:
            axes.vlines(
                *zip(*bars, strict=True), color=COLOURS[method], linewidth=2.5, label=f"its {_percent(study)} interval"
            )
    bottom, top = min(shown) / 2, max(shown) * 2
    wide = any(row["low"] is not None and (row["low"] < bottom or row["high"] > top) for row in study["targets"])
    axes.axhline(1, color="#444444", linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(-0.5, len(targets) - 0.5)
    axes.set_xticks(range(len(targets)), [f"{target:.6g}" for target in targets])
    for y, told in ((0.97, "above 1: the distilled arm is sooner"), (0.06, "below 1: it is later")):
        axes.annotate(told, (0.01, y), xycoords="axes fraction", va="top", fontsize=8, color="#444444")
    axes.set(
        title="Speed-up to equal quality" + (" (intervals are wider than the picture)" if wide else ""),
        xlabel=f"target {study['metric']}, harder to the right ({_direction(study)})",
        ylabel="seconds of the baseline / of the distilled",
    )
    axes.grid(alpha=0.2)
    if len(shown) > 1:
        axes.legend(fontsize=8, loc="upper right")
    return figure


def _saved_figure(study: dict[str, Any], drawn: dict[str, dict[str, Any]]) -> Figure:
    """A saving that does not grow is a head start; one that grows in proportion is a faster method."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    method, _ = _judge(study)
    qualities, cubic, straight = drawn["saved"][method]
    for column, (axes, unit) in enumerate(zip(figure.subplots(1, 2), ("steps", "training seconds"), strict=True)):
        axes.axhline(0, color="#444444", linewidth=1.2)
        axes.plot(qualities, cubic[:, column], color=COLOURS[method], linewidth=2.5, label=METHODS[method].lower())
        if straight is not None:
            lines = straight[:, column]
            axes.fill_between(
                qualities,
                cubic[:, column],
                lines,
                color=COLOURS[method],
                alpha=0.25,
                label="to straight lines between lengths",
            )
        if study["lower_is_better"]:
            axes.invert_xaxis()
        axes.set(xlabel=f"{study['metric']}, harder to the right", ylabel=f"{unit} saved")
        axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    return figure
