"""README.md, what it shows, and its summary in the project's README, from the runs' lines beside this file.

    python recipes/results/tables.py

A study lies in a folder of its own: study.json, and what its runs said in runs.json and runs.csv (kd_core/runs/lean.py); the
teachers and caches that prepare.sh made lie in `prepared`, in the same form. README.md is README.md.jinja with the numbers that the
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
from kd_core.runs.design import Study, read_study
from kd_core.teachers.sources import CACHE_PREFIX
from kd_core.time_to_quality import comparison as time_to_quality
from kd_core.time_to_quality import report as time_to_quality_report

HERE = Path(__file__).parent
TEMPLATE = "README.md.jinja"
PREPARED = "prepared"  # what prepare.sh made, for all studies, or in the folder of one on a machine of its own
LONGEST = "longest"
# (what it is, study, arm, its teacher) of the table of what was found.
FOUND = (
    (
        "BERT, 2 layers, long enough to leave its early plateau alone; a larger teacher in the first 20 %",
        "bert_long",
        "large",
        "good",
    ),
    ("the same; a teacher of its own size, to the end", "bert_long", "long", "long"),
    ("the same BERT, too short to leave it alone; a larger teacher to the end", "bert", "kd", "good"),
    ("ResNet-8, CIFAR-10; a teacher of its own size", "resnet_window", "kd", "resnet8_16"),
    ("ResNet-8, photographs; a larger teacher", "imagenette", "kd", "imagenette20"),
)
METHODS = {"tradeoff": "ends of runs", "learning": "first crossings", LONGEST: "first crossings, longest runs"}


# --- lines ------------------------------------------------------------------------------------------------------------


@cache
def study_of(name: str) -> Study:
    return read_study(HERE / name / "study.json")


@cache
def runs_of(name: str) -> dict[str, lean.Lean]:
    """By ARM/STEPS/SEED, runs outside of the study's design included."""
    return lean.read(HERE / name)


def lengths_of(name: str, arm: str) -> list[int]:
    """Those that the arm has runs of, lengths that the study lacks included."""
    return sorted({int(run.split("/")[1]) for run in runs_of(name) if run.split("/")[0] == arm})


def prepared_for(name: str) -> str:
    """What was prepared for the study: on its own machine, or for all."""
    own = f"{name}/{PREPARED}"
    return own if (HERE / own).exists() else PREPARED


@cache
def restored(name: str) -> tempfile.TemporaryDirectory[str]:
    """A folder in which the study's runs, teachers and caches lie as they did when they ran."""
    place = tempfile.TemporaryDirectory()
    for run, said in runs_of(name).items():
        lean.restore(said, Path(place.name, "recipes/results", name, run), Path("recipes/results", name))
    for run, said in runs_of(prepared_for(name)).items():
        lean.restore(said, Path(place.name, "runs", run), Path("runs"))
    return place


@cache
def report(name: str, arm: str, longest: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The time-to-quality report of an arm against the baseline, and what its figures show.

    Args:
        longest: of first crossings, each arm in its longest runs, be they another length than the baseline's.
    """
    study = study_of(name)

    def folders(own: str) -> list[Path]:
        lengths = lengths_of(name, own)[-1:] if longest else lengths_of(name, own)
        return [
            Path("recipes/results", name, own, str(steps), str(seed))
            for steps in lengths
            for seed in results(name, own, steps)
        ]

    with contextlib.chdir(restored(name).name):
        return time_to_quality.compared(
            folders(study.baseline), folders(arm), metric=study.metric, lower_is_better=study.lower_is_better,
            may_differ=() if longest else study.may_differ, same_code=study.same_code,
        )  # fmt: skip


# --- numbers ----------------------------------------------------------------------------------------------------------


def results(name: str, arm: str, steps: int) -> dict[int, dict[str, Any]]:
    """What the runs ended with, by seed."""
    own = {run: said for run, said in runs_of(name).items() if run.startswith(f"{arm}/{steps}/")}
    return dict(sorted((int(run.split("/")[2]), said.end | said.record["result"]) for run, said in own.items()))


def shown_as(metric: str) -> tuple[str, int, int]:
    """Its name with its unit, the factor to that unit, and digits."""
    unit, scale, digits = compare.shown_as(metric)
    return unit, scale, digits - 1


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
    values = [sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    told = compare.mean_interval(values).told(digits, signed=False)
    return told if interval else told.split(" ")[0]


def slower(name: str, steps: int, arm: str, other: str = "", *, interval: bool = True) -> str:
    """Training seconds as a multiple of `other`'s, by default the baseline's, in the same seeds; 95 % interval."""
    ours, theirs = (results(name, one, steps) for one in (arm, other or study_of(name).baseline))
    values = [ours[seed]["train_s"] / theirs[seed]["train_s"] for seed in ours if seed in theirs]
    told = compare.ratio_interval(values).told(2, signed=False)
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
        """After how many students the teachers and their caches are paid back, where it is faster."""
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
    if arm == study_of(name).baseline or (method == LONGEST and not has_longer(name)):
        return Times([])
    rows = report(name, arm, method == LONGEST)[0]["targets"]
    method = "learning" if method == LONGEST else method
    return Times([row for row in rows if row["method"] == method and row["speedup"] is not None])


def has_longer(name: str) -> bool:
    """Whether the baseline has runs that are longer than the study's."""
    study = study_of(name)
    return max(lengths_of(name, study.baseline)) > max(study.lengths)


def equal_speed(name: str, arm: str) -> str:
    """The median of `longest`, were the baseline's longer runs as fast a step as its runs of the study's longest."""
    longest = max(lengths_of(name, study_of(name).baseline))
    slow, fast = (
        np.mean([run["train_s"] / steps for run in results(name, study_of(name).baseline, steps).values()])
        for steps in (longest, max(study_of(name).lengths))
    )
    return f"{np.median([row['speedup'] for row in times(name, arm, LONGEST).rows]) * fast / slow:.1f}"


def prepared(path: str, entry: str, digits: int = 0, scale: float = 1, study: str = "") -> str:
    """Of what prepare.sh made: `entry` of a teacher's last line, or the `train_s` that making a cache took."""
    return f"{scale * runs_of(prepared_for(study))[path].end[entry]:.{digits}f}"


def teachers_quality(name: str, arm: str, digits: int | None = None, index: int = 0) -> str:
    """Of one of the arm's teachers, on the documents or images that judge the students."""
    study = study_of(name)
    _, scale, own_digits = shown_as(study.metric)
    record = runs_of(name)[f"{arm}/{study.lengths[0]}/{study.seeds[0]}"].record
    value = scale * record["teachers"][index][study.metric]
    return f"{value:.{own_digits if digits is None else digits}f}"


# --- tables -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def arms(name: str) -> str:
    """Quality of all arms at equal steps."""
    study = study_of(name)
    unit, _, digits = shown_as(study.metric)
    rows = []
    for steps, arm in itertools.product(sorted(study.all_lengths), study.arms):
        own = qualities(name, steps, arm)
        if own:
            alone = arm == study.baseline or not own.keys() & qualities(name, steps, study.baseline).keys()
            apart = [] if alone else [gain(name, steps, arm), slower(name, steps, arm)]
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


def observed(name: str) -> str:
    """Of finished runs, the shortest with a teacher that are as good as those alone in every seed."""
    study = study_of(name)
    head = [
        "arm",
        f"alone: steps, {study.metric}",
        "with a teacher: steps",
        "seeds",
        "seconds alone",
        "with",
        "times as fast",
    ]
    rows = []
    for arm in study.arms:
        for pair in report(name, arm)[0]["observed"] if "--teachers" in study.arm(arm).flags else []:
            spread = "" if pair["low"] is None else f" ({pair['low']:.2f} to {pair['high']:.2f})"
            alone = f"{pair['baseline_steps']}, {pair['quality']:.3f}"
            seconds = [f"{pair[f'{side}_s']:.0f}" for side in ("baseline", "against")]
            rows.append(
                [arm, alone, str(pair["against_steps"]), str(pair["seeds"]), *seconds, f"{pair['speedup']:.2f}{spread}"]
            )
    return table(head, rows)


def online_totals() -> str:
    """At how many targets of all studies in `verdicts` online distillation is faster, by the ends of runs."""
    counts: Counter[str] = Counter()
    for name, arm in arms_with_teachers():
        if CACHE_PREFIX not in study_of(name).arm(arm).flags:
            counts.update(row["verdict"] for row in times(name, arm).rows)
    return ", ".join(f"{verdict} at {counts[verdict]}" for verdict in ("faster", "not decided", "slower"))


def arms_with_teachers() -> list[tuple[str, str]]:
    """(study, arm) of the studies whose baseline has no teacher."""
    designs = [(name, study_of(name)) for name in studies()]
    alone = [(name, study) for name, study in designs if "--teachers" not in study.arm(study.baseline).flags]
    return [(name, arm) for name, study in alone for arm in study.arms if "--teachers" in study.arm(arm).flags]


def verdicts() -> str:
    """Every arm with teachers of every study whose baseline has none: where it paid."""
    rows = []
    for (name, arm), method in itertools.product(arms_with_teachers(), METHODS):
        found = times(name, arm, method)
        if found.rows:
            source = "a cache" if CACHE_PREFIX in study_of(name).arm(arm).flags else "its model"
            counts = Counter(row["verdict"] for row in found.rows)
            told = [str(counts[verdict] or "") for verdict in ("faster", "not decided", "slower")]
            rows.append([name, arm, source, METHODS[method], found.targets, found.range, *told])
    head = ["study", "arm", "teacher's answers from", "by", "targets", "times as fast"]
    return table([*head, "faster", "not decided", "slower"], rows)


def crossings(name: str) -> str:
    """After how many seconds the runs of each arm and length, lengths that the study lacks included, were at a loss."""
    targets, rows = (6.0, 5.8, 5.5, 5.0, 4.5, 4.0, 3.7), []
    for arm in study_of(name).arms:
        for length in lengths_of(name, arm):
            runs = [evaluations(runs_of(name)[f"{arm}/{length}/{seed}"]) for seed in study_of(name).seeds]
            cells = []
            for target in targets:
                first = [next((at["train_s"] for at in run if at["eval/loss"] <= target), None) for run in runs]
                seen = [seconds for seconds in first if seconds is not None]
                if len(seen) == len(first):
                    cells.append(f"{math.exp(np.mean(np.log(seen))):.0f} ({min(seen):.0f} to {max(seen):.0f})")
                else:
                    cells.append(f"{len(seen)} of {len(first)} seeds" if seen else "")
            if any(cells):
                rows.append([arm, str(length), *cells])
    return table(["arm", "steps", *(f"s to {target}" for target in targets)], rows)


def evaluations(run: lean.Lean) -> list[dict[str, Any]]:
    return [line for line in run.lines if "eval/loss" in line]


def steps_to(name: str, arm: str, steps: int, loss: float) -> dict[int, int | None]:
    """The first evaluation at or below a loss, by seed."""
    runs = {seed: evaluations(runs_of(name)[f"{arm}/{steps}/{seed}"]) for seed in results(name, arm, steps)}
    return {seed: next((at["step"] for at in run if at["eval/loss"] <= loss), None) for seed, run in runs.items()}


def head_start(name: str, arm: str, loss: float) -> str:
    """Steps that the arm's longest runs save on the baseline's to a loss, mean over seeds, and both."""
    ours, theirs = (
        float(np.mean([at for at in steps_to(name, one, lengths_of(name, one)[-1], loss).values() if at]))
        for one in (arm, study_of(name).baseline)
    )
    return f"{theirs - ours:.0f} steps of {theirs:.0f}"


def found_out(name: str, how: str) -> str:
    """What the lines say of an entry of the study's "predicted": a function, an arm, a length, and a loss."""
    function, arm, steps, *losses = how.split()
    if not qualities(name, int(steps), arm):
        return "not run yet"
    if function == "quality":
        return quality(name, int(steps), arm)
    if function == "part":
        part = compare.compare(study_of(name), runs_of(name), int(steps)).own_part(arm)
        return part.told(3, signed=False) if part else "the runs do not say"
    ours, theirs = (steps_to(name, one, int(steps), float(losses[0])) for one in (arm, study_of(name).baseline))
    if function == "saved":
        pairs = [(theirs.get(seed), at) for seed, at in ours.items()]
        saved = [alone - at for alone, at in pairs if alone and at]
        return f"{np.mean(saved):.0f}, in {len(saved)} seeds" if saved else "not reached"
    return ", ".join(str(at or "not reached") for at in ours.values())


def predicted(name: str) -> str:
    """What was written down before the study's runs, and what they said."""
    rows = [[what, expected, found_out(name, how)] for what, how, expected in study_of(name).predicted]
    return table(["", "predicted", "found"], rows)


def has_runs(name: str) -> bool:
    return name in studies()


def single_runs(name: str) -> str:
    """Where the single runs in a folder ended."""
    rows = []
    for run, said in sorted(((run.split("/")[0], said) for run, said in runs_of(name).items()), key=lambda one: one[0]):
        metric = {"bert_kd": "eval/loss", "resnet_kd": "eval/accuracy"}[said.record["recipe"]]
        unit, scale, digits = shown_as(metric)
        planned = said.record["config"]["steps"]
        last = evaluations(said)[-1]
        steps = f"{planned}" if last["step"] == planned else f"{last['step']} of {planned}"
        rows.append([run, steps, f"{scale * last[metric]:.{digits}f}"])
    return table(["run", "steps", unit], rows)


def found() -> str:
    """What a teacher saved, and what it cost, by finished runs."""
    rows = []
    for setting, name, arm, teacher in FOUND:
        study, saved = study_of(name), compare.saved(study_of(name), runs_of(name), arm)
        assert saved is not None
        digits = shown_as(study.metric)[2] - (study.metric == "eval/loss")
        unit = " %" if study.metric == "eval/accuracy" else ""
        ours, steps = saved.steps
        alone, with_it = saved.seconds
        once = prepared(f"teachers/{teacher}", "train_s", study=name)
        students = math.ceil(float(once) / (alone - with_it)) if with_it < alone else 0
        rows.append([
            setting, f"{steps}", *(f"{quality(name, steps, one, digits)}{unit}" for one in (study.baseline, arm)),
            f"{ours}", f"{saved.cost[0]:.2f}",
            f"{alone:.0f} → {with_it:.0f} ({with_it / alone:.2f})", f"{once} s", f"{students} students" if students else "never",
        ])  # fmt: skip
    head = [
        "student; teacher",
        "steps",
        "alone",
        "distilled",
        "as good after",
        "a step costs",
        "seconds",
        "teacher's training",
        "paid back after",
    ]
    return table(head, rows)


def seconds_for_longest(name: str, arm: str) -> str:
    """Of those of the baseline's longest runs, to be as good; smallest to largest."""
    saved = compare.saved(study_of(name), runs_of(name), arm)
    assert saved is not None
    return "{:.2f} ({:.2f} to {:.2f})".format(*saved.share)


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
    """Those that have runs."""
    return sorted(file.parent.name for file in HERE.glob("*/study.json") if file.with_name("runs.json").exists())


def methods() -> str:
    """A row a study of a method, by its claim after its longest runs."""
    rows = []
    for folder in sorted(file.parent for file in HERE.glob("methods/*/runs.json")):
        study = read_study(folder / "study.json")
        rows.append(compare.row(compare.compare(study, lean.read(folder), max(study.shared_lengths))))
    return table(compare.HEAD, rows)


FOR_THE_PAGE: tuple[Callable[..., Any], ...] = (
    arms, compared, crossings, equal_speed, found, gain, glue, glue_gap, head_start, methods, milliseconds, observed, online_totals, prepared, predicted, quality, has_runs, seconds_for_longest, single_runs, slower, speedup,
    teachers_quality, times, verdicts,
)  # fmt: skip


def page() -> str:
    """README.md."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    template = environment.from_string((HERE / TEMPLATE).read_text())
    return template.render({function.__name__: function for function in FOR_THE_PAGE})


def with_table(readme: str) -> str:
    """The project's README with its table made anew."""
    first, last = "<!-- made by recipes/results/tables.py -->\n", "<!-- end -->"
    return re.sub(f"{first}.*?{last}", lambda _: f"{first}{found()}\n{last}", readme, flags=re.DOTALL)


def draw() -> None:
    """The pictures of the page."""
    with tempfile.TemporaryDirectory() as place:
        time_to_quality_report.write(*report("bert_long", "large", True), Path(place))
        Path(place, "quality.png").rename(HERE / "bert_long.png")


if __name__ == "__main__":
    draw()
    (HERE / "README.md").write_text(page())
    readme = HERE.parents[1] / "README.md"
    readme.write_text(with_table(readme.read_text()))
