"""The reports of the studies beside this file from their runs' lines, and from both the tables of README.md.

    python recipes/results/tables.py        makes them anew; prose between the tables is left as it is

A study lies in a folder of its own as kd_core.study leaves it. A table stands below a line `<!-- KIND STUDY -->`: `arms`
is the quality of all arms at equal steps, `speedup` the reports' time to equal quality, their targets in few words,
`glue` what GLUE says of models, the table of the folder's glue.json, `runs` where single runs ended, and `crossings`
after how many seconds the runs of each arm and length were first seen at a loss (geometric mean, smallest to largest),
lengths that the study lacks included.
"""

import contextlib
import itertools
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_core import glue_report, time_to_quality
from kd_core.quality_curves import student_t
from kd_core.study import Study, read_study, write_reports

HERE = Path(__file__).parent
LONGEST = "longest"  # folder of the reports of _write_longest, for a study with a baseline in longer runs
MARK = re.compile(r"(<!-- (arms|speedup|glue|runs|crossings) (\S+) -->\n)(?:\|.*\n)*")


def results(folder: Path, study: Study) -> dict[tuple[str, int], dict[int, dict[str, Any]]]:
    """`result` of the study's finished runs, by (arm, steps) and seed."""
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for arm in study.arms:
        for steps in study.lengths:
            for seed in study.seeds:
                file = folder / arm / str(steps) / str(seed) / "run.json"
                run = json.loads(file.read_text()) if file.exists() else {}
                if run.get("result", {}).get("stopped") == "finished":
                    found.setdefault((arm, steps), {})[seed] = run["result"]
    return found


def mean_and_interval(values: Sequence[float], digits: int) -> str:
    """Mean and its 95 % interval (Student's t), which a single value has not."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ({mean - half:.{digits}f} to {mean + half:.{digits}f})"


def ratio_and_interval(values: Sequence[float]) -> str:
    """Geometric mean and its 95 % interval."""
    logs = np.log(values)
    half = student_t(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    middle, low, high = (math.exp(float(logs.mean()) + shift) for shift in (0.0, -half, half))
    return f"{middle:.2f}" + ("" if math.isnan(half) else f" ({low:.2f} to {high:.2f})")


def shown_as(metric: str) -> tuple[str, int, int]:
    """Its name with its unit, the factor to that unit, and digits."""
    return ("eval/accuracy, %", 100, 1) if metric == "eval/accuracy" else (metric, 1, 3)


def arms_table(folder: Path, study: Study) -> list[str]:
    found = results(folder, study)
    unit, scale, digits = shown_as(study.metric)
    lines = [
        f"| steps | arm | {unit}, by seed | mean | less that without teacher, same seeds | seconds, times those without |",
        "|---|---|---|---|---|---|",
    ]
    for steps in study.lengths:
        plain = found.get((study.baseline, steps), {})
        for arm in study.arms:
            own = found.get((arm, steps), {})
            if not own:
                continue
            quality = {seed: scale * result[study.metric] for seed, result in own.items()}
            shared = [seed for seed in own if seed in plain and arm != study.baseline]
            apart = [quality[seed] - scale * plain[seed][study.metric] for seed in shared]
            slower = [own[seed]["train_s"] / plain[seed]["train_s"] for seed in shared]
            cells = [
                str(steps),
                arm,
                ", ".join(f"{value:.{digits}f}" for value in quality.values()),
                f"{np.mean(list(quality.values())):.{digits}f}",
                mean_and_interval(apart, digits) if apart else "",
                ratio_and_interval(slower) if slower else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def write_all_reports(folder: Path, out: Path) -> None:
    """The reports of the study in `folder` from its lines, into `out`; the teachers' own costs from prepared/."""
    study, runs = read_study(folder / "study.json"), Path("recipes/results", folder.name)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        Path("runs").symlink_to(HERE / "prepared")
        Path("recipes").symlink_to(HERE.parent)
        write_reports(study, runs, out / "report")
        if (folder / LONGEST).exists():
            _write_longest(study, runs, out / LONGEST)


def _write_longest(study: Study, runs: Path, out: Path) -> None:
    """Reports of first crossings, each arm in its longest runs in `runs`, be they another length than the baseline's."""

    def folders(arm: str) -> list[Path]:
        steps = max((path.name for path in (runs / arm).iterdir()), key=int)
        return [runs / arm / steps / str(seed) for seed in study.seeds]

    for arm in study.arms:
        if arm != study.baseline:
            time_to_quality.report(folders(study.baseline), folders(arm), metric=study.metric, out=out / arm)


def speedup_table(folder: Path, study: Study) -> list[str]:
    lines = [
        f"| arm | method | times as fast to the easiest {study.metric} | to the hardest | median | verdicts |",
        "|---|---|---|---|---|---|",
    ]

    def reached(row: dict[str, Any]) -> str:
        spread = "" if row["low"] is None else f" ({row['low']:.2f} to {row['high']:.2f})"
        seconds = f"{row['against_s']:.0f} s in place of {row['baseline_s']:.0f}"
        return f"{row['speedup']:.2f}{spread}, {row['target']:g} in {seconds}"

    for arm, reports in itertools.product(study.arms, ("report", LONGEST)):
        file = folder / reports / arm / "report.json"
        targets = json.loads(file.read_text())["targets"] if file.exists() else []
        for method in dict.fromkeys(row["method"] for row in targets):
            rows = [row for row in targets if row["method"] == method and row["speedup"] is not None]
            method = LONGEST if reports == LONGEST else method
            if rows:
                median = np.median([row["speedup"] for row in rows])
                verdicts = Counter(row["verdict"] for row in rows)
                counts = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.items())
                lines.append(
                    f"| {arm} | {method} | {reached(rows[0])} | {reached(rows[-1])} | {median:.2f} | {counts} |"
                )
    return lines


def evaluations(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "eval/loss" in line]


def runs_table(folder: Path) -> list[str]:
    rows = []
    for run in sorted(folder.iterdir()):
        last, record = evaluations(run)[-1], json.loads((run / "run.json").read_text())
        metric = {"bert_kd": "eval/loss", "resnet_kd": "eval/accuracy"}[record["recipe"]]
        unit, scale, digits = shown_as(metric)
        planned = record["config"]["steps"]
        steps = f"{planned}" if last["step"] == planned else f"{last['step']} of {planned}"
        rows.append(f"| {run.name} | {steps} | {scale * last[metric]:.{digits}f} |")
    return [f"| run | steps | {unit} |", "|---|---|---|", *rows]


def crossings_table(folder: Path, study: Study) -> list[str]:
    targets = (6.0, 5.8, 5.5, 5.0, 4.5, 4.0, 3.7)
    lines = ["| arm | steps | " + " | ".join(f"s to {target}" for target in targets) + " |"]
    lines.append("|---|---|" + "---|" * len(targets))
    for arm in study.arms:
        for length in sorted((folder / arm).iterdir(), key=lambda path: int(path.name)):
            runs, cells = [evaluations(length / str(seed)) for seed in study.seeds], []
            for target in targets:
                first = [next((at["train_s"] for at in run if at["eval/loss"] <= target), None) for run in runs]
                seen = [seconds for seconds in first if seconds is not None]
                if len(seen) == len(first):
                    cells.append(f"{math.exp(np.mean(np.log(seen))):.0f} ({min(seen):.0f} to {max(seen):.0f})")
                else:
                    cells.append(f"{len(seen)} of {len(first)} seeds" if seen else "")
            if any(cells):
                lines.append(f"| {arm} | {length.name} | " + " | ".join(cells) + " |")
    return lines


def render(text: str, root: Path = HERE) -> str:
    """`text` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        mark, kind, name = match.groups()
        if kind == "glue":
            text = glue_report.markdown(json.loads((root / name / "glue.json").read_text()))
            lines = list(itertools.takewhile(bool, text.split("\n")))
        elif kind == "runs":
            lines = runs_table(root / name)
        else:
            make = {"arms": arms_table, "speedup": speedup_table, "crossings": crossings_table}[kind]
            lines = make(root / name, read_study(root / name / "study.json"))
        return mark + "".join(f"{line}\n" for line in lines)

    return MARK.sub(table, text)


if __name__ == "__main__":
    for file in sorted(HERE.glob("*/study.json")):
        write_all_reports(file.parent, file.parent)
    page = HERE / "README.md"
    page.write_text(render(page.read_text()))
