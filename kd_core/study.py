"""A matched study: arms x lengths x seeds of one recipe, interleaved and resumable, then the time-to-quality reports.

    bash launch/study.sh STUDY.json [--out DIR] [--jobs N]      (the same: python -m kd_core.study)

A study file, of which the entries from `flags` on may be left out:

    {
      "recipe": "recipes/bert_kd.py",
      "arms": {"baseline": "", "kd": "--teachers {teacher} --kd-ratio 0.9"},
      "baseline": "baseline",
      "lengths": [150, 300],
      "seeds": [1, 2],
      "flags": "--student tiny --data embedded",
      "teacher": "--student mini --steps 300",
      "metric": "eval/loss",
      "lower_is_better": true,
      "may_differ": [],
      "ranks": 1
    }

An arm is the flags that it adds to `flags`; `lengths` are --steps; `teacher`, flags over `flags` too, is trained first and
named {teacher} in the arms; `metric`, `lower_is_better` (for a metric that the report does not know) and `may_differ` are
the report's flags; `ranks` is the number of processes (GPUs) of one run. Runs lie in DIR/<arm>/<steps>/<seed>,
their output beside them in <seed>.log, the reports of each arm against `baseline` in DIR/report/<arm>.

The same call continues a study that was stopped or killed. What has finished is kept, so arms, lengths and seeds can be
added; a flag that would alter a run already begun is refused.
"""

import dataclasses
import json
import math
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_core import cli
from kd_core.runs import jobs
from kd_core.system import files
from kd_core.time_to_quality import comparison as time_to_quality
from kd_core.time_to_quality import curves

TEACHER, REPORT = "teacher", "report"  # folders of the study beside those of the arms
NO_ARM = (TEACHER, f"{TEACHER}.log", REPORT, "study.json")


@dataclasses.dataclass(frozen=True)
class Study:
    """The study file's entries; the module's docstring says what they mean."""

    recipe: str
    arms: dict[str, str]
    baseline: str
    lengths: list[int]
    seeds: list[int]
    flags: str = ""
    teacher: str | None = None
    metric: str = "eval/loss"
    lower_is_better: bool | None = None
    may_differ: Sequence[str] = ()
    ranks: int = 1

    def __post_init__(self) -> None:
        def different(values: Any, least: int) -> bool:
            whole = isinstance(values, list) and all(type(value) is int and value >= least for value in values)
            return whole and 0 < len(values) == len(set(values))

        def are_flags(text: Any) -> bool:
            try:
                return isinstance(text, str) and shlex.split(text) is not None
            except ValueError:  # a quote that does not close
                return False

        arms = self.arms if isinstance(self.arms, dict) else {}
        arms_ok = len(arms) > 1 and all(
            are_flags(flags) and re.fullmatch(r"\w[\w.+-]*", name) and name not in NO_ARM
            for name, flags in arms.items()
        )
        fields_ok = isinstance(self.may_differ, Sequence) and all(isinstance(name, str) for name in self.may_differ)
        checks = {
            "recipe": (isinstance(self.recipe, str), "the file of a recipe"),
            "arms": (arms_ok, f"two or more names (not {' or '.join(NO_ARM)}), each with its flags as one text"),
            "baseline": (self.baseline in list(arms), f"one of the arms {list(arms)}"),
            "lengths": (different(self.lengths, 1), "a list of different numbers of steps"),
            "seeds": (different(self.seeds, 0), "a list of different seeds"),
            "flags": (are_flags(self.flags), "flags as one text, its quotes closed"),
            "teacher": (self.teacher is None or are_flags(self.teacher), "flags as one text, its quotes closed"),
            "metric": (isinstance(self.metric, str), "the name of an evaluation metric, such as eval/loss"),
            "lower_is_better": (isinstance(self.lower_is_better, bool | None), "true or false"),
            "may_differ": (not isinstance(self.may_differ, str) and fields_ok, "a list of fields of the runs' config"),
            "ranks": (type(self.ranks) is int and self.ranks > 0, "a number of processes, at least 1"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise ValueError(f'"{name}" must be {allowed}, got {json.dumps(getattr(self, name))}')


@dataclasses.dataclass(frozen=True)
class Run(jobs.Job):
    """One training of the design: `name` is its folder within the study's."""

    config: Any

    @property
    def arm(self) -> str:
        return self.name.split("/")[0]


def read_study(file: Path) -> Study:
    """The study that `file` describes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, an unknown or a missing entry, a value that is not allowed.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a study file such as launch/example_study.json")
    fields = dataclasses.fields(Study)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    try:
        entries = json.loads(file.read_text())
        wrong = sorted(needed - set(entries)) + sorted(set(entries) - {field.name for field in fields})
        if wrong:
            known = ", ".join(field.name for field in fields)
            problem = "lacks" if wrong[0] in needed else "has an unknown entry"
            raise ValueError(f'{problem} "{wrong[0]}"; its entries are {known}')
        return Study(**entries)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def interleaved(study: Study) -> Iterator[tuple[str, int, int]]:
    """(arm, steps, seed) in the order of running: arms innermost, their order rotated from block to block.

    So a machine that drifts hits all arms alike, and after each seed there is a complete, if small, design.
    """
    arms = list(study.arms)
    for i, seed in enumerate(study.seeds):
        for j, steps in enumerate(study.lengths):
            first = (i + j) % len(arms)
            yield from ((arm, steps, seed) for arm in arms[first:] + arms[:first])


def design(study: Study, out: Path) -> list[Run]:
    """All runs of `study` under the folder `out`, in their order; the teacher's first if it has one.

    Raises:
        FileNotFoundError: the recipe does not exist.
        ValueError: a flag that the recipe refuses or the study sets, {teacher} without the entry "teacher", or runs of
            which the report could say nothing: arms that cannot be compared, an unknown metric.
    """
    time_to_quality.direction(study.metric, study.lower_is_better)
    root = Path(__file__).resolve().parents[1]
    recipe = next((path for path in (Path(study.recipe), root / study.recipe) if path.is_file()), None)
    if recipe is None:
        raise FileNotFoundError(f'"recipe" {study.recipe} does not exist; give a file such as recipes/bert_kd.py')
    config_type = runpy.run_path(str(recipe)).get("Config")
    if config_type is None:
        raise ValueError(f'"recipe" {study.recipe} has no Config; give a file such as recipes/bert_kd.py')
    start = [str(recipe)] if study.ranks == 1 else ["-m", "kd_core.launch", str(recipe)]

    def run(name: str, flags: str, *own: object) -> Run:
        words = shlex.split(f"{study.flags} {flags}")
        for word in words:
            if word.split("=")[0] in ("--out", "--resume", *own):
                raise ValueError(f"the study itself sets {word}; remove it")
            if "{teacher}" in word and study.teacher is None:
                raise ValueError('{teacher} needs the entry "teacher", the flags that train it')
        words = [word.replace("{teacher}", str(out / TEACHER)) for word in words]
        words += [str(word) for word in ("--out", out / name, *own)]
        config = cli.parse(config_type, words)
        needs = (TEACHER,) if study.teacher is not None and name != TEACHER else ()
        return Run(name, out / name, [sys.executable, *start, *words], config.steps, needs, True, config)

    def arm_run(arm: str, steps: int, seed: int) -> Run:
        try:
            return run(f"{arm}/{steps}/{seed}", study.arms[arm], "--steps", steps, "--seed", seed)
        except ValueError as error:
            raise ValueError(f'arm "{arm}": {error}') from None

    teacher = [run(TEACHER, study.teacher)] if study.teacher is not None else []
    runs = [arm_run(*point) for point in interleaved(study)]

    def planned(arm: str) -> list[curves.Run]:
        own = ((run.folder, dataclasses.asdict(run.config)) for run in runs if run.arm == arm)
        return [curves.Run(*pair, np.empty(0), np.empty((0, 6)), window_s=None) for pair in own]

    for arm in study.arms:
        if arm != study.baseline:
            time_to_quality.refuse_unlike(planned(study.baseline), planned(arm), study.may_differ)
    return teacher + runs


def summary(run: Run, metric: str) -> str:
    """A finished run in a few words."""
    result = json.loads((run.folder / "run.json").read_text())["result"]
    if metric not in result:
        known = ", ".join(name for name in result if "/" in name)
        raise ValueError(f'"metric" {metric} is none of those that {run.folder} has: {known}')
    value = math.nan if result[metric] is None else result[metric]
    return f"{run.name} {metric} {value:.4f}, {result['train_s']:.0f} s of training"


def write_reports(study: Study, runs: Path, out: Path) -> None:
    """The reports of each arm against the baseline, into a folder of `out` each; the study in `runs` has finished."""

    def folders(arm: str) -> list[Path]:
        return [runs / name / str(steps) / str(seed) for name, steps, seed in interleaved(study) if name == arm]

    for arm in study.arms:
        if arm != study.baseline:
            time_to_quality.report(
                folders(study.baseline), folders(arm), metric=study.metric, lower_is_better=study.lower_is_better,
                may_differ=study.may_differ, out=out / arm,
            )  # fmt: skip


def main() -> None:
    parser = cli.OneLineParser(prog="python -m kd_core.study", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, metavar="STUDY.json", help="what to run; see the top of kd_core/study.py")
    parser.add_argument("--out", type=Path, help="folder of the study; default runs/study/<name of the file>")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one a GPU, or one without a GPU")
    with cli.one_line_errors():
        args = parser.parse_args()
        study = read_study(args.study)
        out = args.out or Path("runs/study") / args.study.stem
        runs, at_once = design(study, out), jobs.places(args.jobs, study.ranks)
        if out.exists() and not (out / "study.json").is_file() and (out.is_file() or list(out.glob("[!.]*"))):
            raise ValueError(f"--out {out} exists and holds no study; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        with jobs.locked(out) as lock:
            for run in runs:
                recipe, config = Path(study.recipe).stem, dataclasses.asdict(run.config)
                jobs.check_unchanged(run, config, recipe=recipe, ranks=study.ranks)
            files.write_atomic(out / "study.json", args.study.read_text())
            jobs.run_all(runs, at_once, lock, lambda run: summary(run, study.metric), out)
            write_reports(study, out, out / REPORT)


if __name__ == "__main__":
    main()
