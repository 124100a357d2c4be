"""The reports of the studies beside this file from their runs' lines; from both, README.md, and its summary in the project's.

    python recipes/results/tables.py

A study lies in a folder of its own as kd_core.study leaves it. README.md is README.md.jinja with the numbers that the
functions of `FOR_THE_PAGE` read from the lines, so that none is written by hand but what a run was set to.
"""

import contextlib
import itertools
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import scipy.stats

from kd_core import compare
from kd_core.glue import report as glue_report
from kd_core.runs import lean
from kd_core.study import Study, read_study, write_reports
from kd_core.teachers.sources import CACHE_PREFIX
from kd_core.time_to_quality import comparison as time_to_quality
from kd_core.time_to_quality.curves import quantile

HERE = Path(__file__).parent
TEMPLATE = "README.md.jinja"
PREPARED = "prepared"  # what prepare.sh made, for all studies, or in the folder of one on a machine of its own
REPORT, LONGEST = "report", "longest"  # folders of the reports; of _write_longest, for a baseline in longer runs
METHODS = {"tradeoff": "ends of runs", "learning": "first crossings", LONGEST: "first crossings, longest runs"}


# --- reports ----------------------------------------------------------------------------------------------------------


def write_all_reports(folder: Path, out: Path) -> None:
    """The reports of the study in `folder` from its lines, into `out`; the teachers' own costs from what was prepared."""
    study, runs = read_study(folder / "study.json"), Path("recipes/results", folder.name)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        Path("runs").symlink_to(prepared_for(folder))
        Path("recipes").symlink_to(HERE.parent)
        write_reports(study, runs, out / REPORT)
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


# --- numbers ----------------------------------------------------------------------------------------------------------


@cache
def study_of(name: str) -> Study:
    return read_study(HERE / name / "study.json")


@cache
def results(name: str, arm: str, steps: int) -> dict[int, dict[str, Any]]:
    """`result` of the finished runs by seed, those outside of the study's design included."""
    found = {}
    for file in (HERE / name / arm / str(steps)).glob("*/run.json"):
        result = json.loads(file.read_text()).get("result", {})
        if result.get("stopped") == "finished":
            found[int(file.parent.name)] = result
    return dict(sorted(found.items()))


def shown_as(metric: str) -> tuple[str, int, int]:
    """Its name with its unit, the factor to that unit, and digits."""
    return ("eval/accuracy, %", 100, 1) if metric == "eval/accuracy" else (metric, 1, 3)


def qualities(name: str, steps: int, arm: str) -> dict[int, float]:
    metric = study_of(name).metric
    return {seed: shown_as(metric)[1] * result[metric] for seed, result in results(name, arm, steps).items()}


def quality(name: str, steps: int, arm: str, digits: int | None = None) -> str:
    """Mean over seeds at the end of runs."""
    digits = shown_as(study_of(name).metric)[2] if digits is None else digits
    return f"{np.mean(list(qualities(name, steps, arm).values())):.{digits}f}"


def gain(name: str, steps: int, arm: str, other: str = "", *, interval: bool = True, sign: int = 1) -> str:
    """`sign` times mean difference of quality to `other`, by default the baseline, in the same seeds; 95 % interval."""
    ours, theirs = (qualities(name, steps, one) for one in (arm, other or study_of(name).baseline))
    digits = shown_as(study_of(name).metric)[2]
    told = mean_and_interval([sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs], digits)
    return told if interval else told.split(" ")[0]


def slower(name: str, steps: int, arm: str, other: str = "", *, interval: bool = True) -> str:
    """Training seconds as a multiple of `other`'s, by default the baseline's, in the same seeds; 95 % interval."""
    ours, theirs = (results(name, one, steps) for one in (arm, other or study_of(name).baseline))
    told = ratio_and_interval([ours[seed]["train_s"] / theirs[seed]["train_s"] for seed in ours if seed in theirs])
    return told if interval else told.split(" ")[0]


def milliseconds(name: str, steps: int, arm: str) -> str:
    """Of a step, the teacher's part left out; mean over seeds."""
    runs = results(name, arm, steps).values()
    return f"{np.mean([1e3 * (run['train_s'] - run['teacher_s']) / steps for run in runs]):.0f}"


class Times(NamedTuple):
    """How many times as fast to each target in reach, the easiest first."""

    rows: Sequence[dict[str, Any]]

    @property
    def range(self) -> str:
        ratios = [row["speedup"] for row in self.rows]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    @property
    def median(self) -> str:
        return f"{np.median([row['speedup'] for row in self.rows]):.2f}"

    @property
    def share_of_steps(self) -> str:
        """Median over targets of its steps as a share of the baseline's, %."""
        return f"{100 * np.median([row['against']['steps'] / row['baseline']['steps'] for row in self.rows]):.0f}"

    @property
    def range_at_equal_parts(self) -> str:
        """As `range`, had a step of the student's own part taken what it takes the baseline."""
        ratios = []
        for row in self.rows:
            ours, theirs = row["against"], row["baseline"]
            student = theirs["seconds"]["student"] / theirs["steps"] * ours["steps"]
            ratios.append(row["baseline_s"] / (row["against_s"] - ours["seconds"]["student"] + student))
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    @property
    def targets(self) -> str:
        return f"{self.rows[0]['target']:g} to {self.rows[-1]['target']:g}"

    @property
    def verdicts(self) -> str:
        counts = Counter(row["verdict"] for row in self.rows)
        return ", ".join(f"{verdict} at {counts[verdict]}" for verdict in counts)

    @property
    def payback(self) -> str:
        """After how many students the teachers and their caches are paid back, where it pays."""
        students = [math.ceil(row["payback_runs"]) for row in self.rows if row["payback_runs"]]
        return f"{min(students)} to {max(students)}" if students else "never"

    def at(self, index: int) -> str:
        row = self.rows[index]
        spread = "" if row["low"] is None else f" ({row['low']:.2f} to {row['high']:.2f})"
        return f"{row['speedup']:.2f}{spread}"

    def told(self, index: int) -> str:
        row = self.rows[index]
        return f"{self.at(index)}, {row['target']:g} in {row['against_s']:.0f} s in place of {row['baseline_s']:.0f}"


@cache
def times(name: str, arm: str, method: str = "tradeoff") -> Times:
    """By the ends of runs (`tradeoff`), by first crossings (`learning`), or those against longer runs (`longest`)."""
    file = HERE / name / (LONGEST if method == LONGEST else REPORT) / arm / "report.json"
    rows = json.loads(file.read_text())["targets"] if file.exists() else []
    method = "learning" if method == LONGEST else method
    return Times([row for row in rows if row["method"] == method and row["speedup"] is not None])


def equal_speed(name: str, arm: str) -> str:
    """The median of `longest`, were the baseline's longer runs as fast a step as its runs of the study's longest."""
    longest = max(int(path.name) for path in (HERE / name / study_of(name).baseline).iterdir())
    slow, fast = (
        np.mean([run["train_s"] / steps for run in results(name, study_of(name).baseline, steps).values()])
        for steps in (longest, max(study_of(name).lengths))
    )
    return f"{np.median([row['speedup'] for row in times(name, arm, LONGEST).rows]) * fast / slow:.1f}"


def prepared_for(folder: Path) -> Path:
    return folder / PREPARED if (folder / PREPARED).exists() else HERE / PREPARED


def prepared(path: str, entry: str, digits: int = 0, scale: float = 1, study: str = "") -> str:
    """Of what prepare.sh made: `entry` of a teacher's result, or the `seconds` that making a cache took."""
    file = prepared_for(HERE / study) / path / ("build.json" if path.startswith("caches") else "run.json")
    record = json.loads(file.read_text())
    return f"{scale * record.get('result', record)[entry]:.{digits}f}"


def teachers_quality(name: str, arm: str, digits: int | None = None, index: int = 0) -> str:
    """Of one of the arm's teachers, on the documents or images that judge the students."""
    study = study_of(name)
    _, scale, own_digits = shown_as(study.metric)
    file = HERE / name / arm / str(study.lengths[0]) / str(study.seeds[0]) / "run.json"
    value = scale * json.loads(file.read_text())["teachers"][index][study.metric]
    return f"{value:.{own_digits if digits is None else digits}f}"


def mean_and_interval(values: Sequence[float], digits: int) -> str:
    """Mean and its 95 % interval (Student's t), which a single value has not."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ({mean - half:.{digits}f} to {mean + half:.{digits}f})"


def ratio_and_interval(values: Sequence[float]) -> str:
    """Geometric mean and its 95 % interval."""
    logs = np.log(values)
    half = quantile(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    middle, low, high = (math.exp(float(logs.mean()) + shift) for shift in (0.0, -half, half))
    return f"{middle:.2f}" + ("" if math.isnan(half) else f" ({low:.2f} to {high:.2f})")


# --- tables -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def arms(name: str) -> str:
    """Quality of all arms at equal steps."""
    study = study_of(name)
    unit, _, digits = shown_as(study.metric)
    rows = []
    for steps, arm in itertools.product(study.lengths, study.arms):
        own = qualities(name, steps, arm)
        if own:
            apart = [] if arm == study.baseline else [gain(name, steps, arm), slower(name, steps, arm)]
            by_seed = ", ".join(f"{value:.{digits}f}" for value in own.values())
            rows.append([str(steps), arm, by_seed, quality(name, steps, arm), *(apart or ["", ""])])
    other = f"`{study.baseline}`"
    head = ["steps", "arm", f"{unit}, by seed", "mean", f"less that of {other}", f"seconds, times those of {other}"]
    return table(head, rows)


def compared(name: str, lengths: Sequence[int], arms: Sequence[str], other: str) -> str:
    """Arms against another than the baseline, at equal steps."""
    unit = shown_as(study_of(name).metric)[0]
    rows = [
        [str(steps), arm, quality(name, steps, arm), gain(name, steps, arm, other), slower(name, steps, arm, other)]
        for steps in lengths
        for arm in arms
    ]
    return table(["steps", "arm", unit, f"less that of `{other}`", f"seconds, times those of `{other}`"], rows)


def speedup(name: str) -> str:
    """The reports' time to equal quality."""
    rows = []
    for arm, method in itertools.product(study_of(name).arms, METHODS):
        found = times(name, arm, method)
        if found.rows:
            rows.append([arm, METHODS[method], found.told(0), found.told(-1), found.median, found.verdicts])
    head = [
        "arm",
        "by",
        f"times as fast to the easiest {study_of(name).metric}",
        "to the hardest",
        "median",
        "verdicts",
    ]
    return table(head, rows)


def online_totals() -> str:
    """At how many targets of all studies in `verdicts` online distillation pays, by the ends of runs."""
    counts: Counter[str] = Counter()
    for name, arm in arms_with_teachers():
        if CACHE_PREFIX not in study_of(name).arms[arm]:
            counts.update(row["verdict"] for row in times(name, arm).rows)
    return ", ".join(f"{verdict} at {counts[verdict]}" for verdict in ("pays", "undecided", "does not pay"))


def arms_with_teachers() -> list[tuple[str, str]]:
    """(study, arm) of the studies whose baseline has no teacher."""
    designs = [(name, study_of(name)) for name in studies()]
    alone = [(name, study) for name, study in designs if "--teachers" not in study.arms[study.baseline]]
    return [(name, arm) for name, study in alone for arm, flags in study.arms.items() if "--teachers" in flags]


def verdicts() -> str:
    """Every arm with teachers of every study whose baseline has none: where it paid."""
    rows = []
    for (name, arm), method in itertools.product(arms_with_teachers(), METHODS):
        found = times(name, arm, method)
        if found.rows:
            source = "a cache" if CACHE_PREFIX in study_of(name).arms[arm] else "its model"
            counts = Counter(row["verdict"] for row in found.rows)
            told = [str(counts[verdict] or "") for verdict in ("pays", "undecided", "does not pay")]
            rows.append([name, arm, source, METHODS[method], found.targets, found.range, *told])
    head = ["study", "arm", "teacher's answers from", "by", "targets", "times as fast"]
    return table([*head, "pays", "undecided", "does not pay"], rows)


def crossings(name: str) -> str:
    """After how many seconds the runs of each arm and length, lengths that the study lacks included, were at a loss."""
    targets, rows = (6.0, 5.8, 5.5, 5.0, 4.5, 4.0, 3.7), []
    for arm in study_of(name).arms:
        for length in sorted((HERE / name / arm).iterdir(), key=lambda path: int(path.name)):
            runs, cells = [evaluations(length / str(seed)) for seed in study_of(name).seeds], []
            for target in targets:
                first = [next((at["train_s"] for at in run if at["eval/loss"] <= target), None) for run in runs]
                seen = [seconds for seconds in first if seconds is not None]
                if len(seen) == len(first):
                    cells.append(f"{math.exp(np.mean(np.log(seen))):.0f} ({min(seen):.0f} to {max(seen):.0f})")
                else:
                    cells.append(f"{len(seen)} of {len(first)} seeds" if seen else "")
            if any(cells):
                rows.append([arm, length.name, *cells])
    return table(["arm", "steps", *(f"s to {target}" for target in targets)], rows)


def evaluations(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "eval/loss" in line]


def single_runs(name: str) -> str:
    """Where the single runs in a folder ended."""
    rows = []
    for run in sorted(path for path in (HERE / name).iterdir() if path.is_dir()):
        last, record = evaluations(run)[-1], json.loads((run / "run.json").read_text())
        metric = {"bert_kd": "eval/loss", "resnet_kd": "eval/accuracy"}[record["recipe"]]
        unit, scale, digits = shown_as(metric)
        planned = record["config"]["steps"]
        steps = f"{planned}" if last["step"] == planned else f"{last['step']} of {planned}"
        rows.append([run.name, steps, f"{scale * last[metric]:.{digits}f}"])
    return table(["run", "steps", unit], rows)


def glue(name: str) -> str:
    """What GLUE says of models, the table of the folder's glue.json."""
    text = glue_report.markdown(json.loads((HERE / name / "glue.json").read_text()))
    return "\n".join(itertools.takewhile(bool, text.split("\n")))


def glue_gap(name: str, task: str, metric: str) -> str:
    """`distilled` less `baseline`, in points; Welch's interval over the seeds of fine-tuning."""
    models = json.loads((HERE / name / "glue.json").read_text())["models"]
    ours, theirs = (
        100 * np.array(models[m]["tasks"][task]["metrics"][metric]["values"]) for m in ("distilled", "baseline")
    )
    low, high = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    return f"{ours.mean() - theirs.mean():.1f} ({low:.1f} to {high:.1f})"


# --- the page ---------------------------------------------------------------------------------------------------------


def studies() -> list[str]:
    return sorted(file.parent.name for file in HERE.glob("*/study.json"))


def methods() -> str:
    """A row a study of a method, by its claim after its longest runs."""
    rows = []
    for folder in sorted(file.parent for file in HERE.glob("methods/*/runs.json")):
        study = read_study(folder / "study.json")
        rows.append(compare.row(compare.compare(study, lean.read(folder), max(study.lengths))))
    return table(compare.HEAD, rows)


FOR_THE_PAGE: tuple[Callable[..., Any], ...] = (
    arms, compared, crossings, equal_speed, gain, glue, glue_gap, methods, milliseconds, online_totals, prepared, quality, single_runs, slower, speedup,
    teachers_quality, times, verdicts,
)  # fmt: skip


def page() -> str:
    """README.md."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    template = environment.from_string((HERE / TEMPLATE).read_text())
    return template.render({function.__name__: function for function in FOR_THE_PAGE})


def quoted(readme: str, page: str) -> str:
    """The project's README with its quotation, the page's section "In short", made anew."""
    lines = page.split("## In short\n\n")[1].split("\n\n")[0].split("\n")
    quotation = "".join(f"> {line}\n" for line in lines)
    return re.sub(r"(?:^> .*\n)+", lambda _: quotation, readme, flags=re.MULTILINE)


if __name__ == "__main__":
    for name in studies():
        with contextlib.redirect_stdout(None):
            write_all_reports(HERE / name, HERE / name)
    (HERE / "README.md").write_text(page())
    readme = HERE.parents[1] / "README.md"
    readme.write_text(quoted(readme.read_text(), page()))
