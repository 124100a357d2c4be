"""A matched study: arms x lengths x seeds, interleaved and resumable, then what it says.

    bash launch/study.sh STUDY [--out DIR] [--jobs N]      (the same: python -m kd_core.study)

STUDY is a study file, or a folder that holds one as study.json. Its entries, of which those from `flags` on may be left out:

    {
      "recipe": "recipes/bert_kd.py",
      "arms": {"baseline": "", "kd": "--teachers {teacher} --kd-ratio 0.9"},
      "baseline": "baseline",
      "lengths": [150, 300],
      "seeds": [1, 2],
      "flags": "--student tiny --data embedded",
      "teacher": "--student mini --steps 300",
      "prepare": {"cache": "-m kd_core.cache build --teacher {teacher} --student tiny"},
      "metric": "eval/loss",
      "lower_is_better": true,
      "may_differ": [],
      "ranks": 1,
      "claim": {"arm": "dkd", "against": "kd", "criterion": "...", "paper": "..."},
      "same_code": [["<commit>", "<digest>", "<digest of losses>"]],
      "predicted": [["loss of kd after 300 steps", "quality kd 300", "5.1 ± 0.1"]]
    }

An arm is the flags that it adds to `flags`, or {"flags": ..., "recipe": ..., "seeds": [...], "lengths": [...]} where it has a recipe,
seeds or lengths of its own; `lengths` are --steps, run in their order; `teacher`, flags over `flags` too, is trained first and named
{teacher} in the arms; `prepare` are commands of Python that run after it, in their order, beside those runs that do not name them, each with --out added and its folder named {cache} likewise: a
recipe's, or one that ends with a manifest.json beside a build.json and a header.json, as caches do. `metric`, `lower_is_better` (for a metric that the report does not know) and
`may_differ` are the report's flags; `ranks` is the number of processes (GPUs) of one run. `predicted` is written down before the runs:
what, how recipes/results/tables.py reads it from their lines, and what is expected.

Runs lie in DIR/<arm>/<steps>/<seed>, their output beside them in <seed>.log; a chain of stages is one run there, of the
seconds of all. What they said stands in two small files as well, runs.json and runs.csv (kd_core/runs/lean.py), in DIR or, where
STUDY is a folder, in that: a run that stands there is not run again, so a study goes on in a later clone. At the end come the
time-to-quality reports of each arm against `baseline`, in DIR/report/<arm>; of a study with a `claim`, which is about a method,
kd_core.compare's tables in their place.

Runs of different code are not mixed: where runs stand there that were made by another kd_core/ or recipe, no new one is added, and no
report told, unless `--check COMMIT` has found that both compute the same: it runs 20 steps of every arm in that commit and here,
compares losses to the last digit, and adds to the study file's `same_code`. A report of older runs, which do not say more than
their commit, says in a note that they are mixed. kd_core/runs/code.py has the rule. It is about losses: seconds compare on one machine,
so reports refuse runs of different hardware, checked or not.

The same call continues a study that was stopped or killed. What has finished is kept, so arms, lengths and seeds can be
added; a flag that would alter a run already begun is refused.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_core import cli, compare
from kd_core.runs import code, folders, jobs, lean
from kd_core.runs.design import REPORT, TEACHER, Study, interleaved, read_study, study_file, write_study
from kd_core.system import files
from kd_core.system.terminal import say
from kd_core.time_to_quality import comparison as time_to_quality
from kd_core.time_to_quality import curves
from kd_core.training.processes import end_process

ROOT = Path(__file__).resolve().parents[1]
CHECKED = 20  # steps


@dataclasses.dataclass(frozen=True)
class Run(jobs.Job):
    """One job of the design: `name` is its folder within the study's. Without `config` it is no run of a recipe."""

    recipe: str = ""
    config: Any = None
    start: str = ""  # the recipe's file

    @property
    def arm(self) -> str:
        return self.name.split("/")[0]

    @property
    def fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    @property
    def defaults(self) -> dict[str, Any]:
        return dataclasses.asdict(type(self.config)())


def _recipe(name: str) -> tuple[str, Any]:
    """The file of the recipe `name`, here or in the project, and its Config."""
    file = next((path for path in (Path(name), ROOT / name) if path.is_file()), None)
    if file is None:
        raise FileNotFoundError(f'"recipe" {name} does not exist; give a file such as recipes/bert_kd.py')
    config_type = runpy.run_path(str(file)).get("Config")
    if config_type is None:
        raise ValueError(f'"recipe" {name} has no Config; give a file such as recipes/bert_kd.py')
    return str(file), config_type


def design(study: Study, out: Path) -> list[Run]:
    """All runs of `study` under the folder `out`, in their order; first those that prepare the others.

    Raises:
        FileNotFoundError: a recipe does not exist.
        ValueError: a flag that a recipe refuses or the study sets, {teacher} without the entry "teacher", or runs of
            which the report could say nothing: arms that cannot be compared, an unknown metric.
    """
    time_to_quality.direction(study.metric, study.lower_is_better)
    recipes = functools.cache(_recipe)
    before: list[str] = []  # what has been prepared

    def job(name: str, recipe: str, words: list[str], own: Sequence[object] = ()) -> Run:
        named = []
        for word in words:
            if word.split("=")[0] in ("--out", "--resume", *own):
                raise ValueError(f"the study itself sets {word}; remove it")
            for other in re.findall(r"{([\w.+-]+)}", word):
                named.append(other)
                if other not in before:
                    raise ValueError(
                        f'{{{other}}} needs the entry "{other}", the flags that train it, or one of "prepare"'
                    )
        words = [re.sub(r"{([\w.+-]+)}", lambda found: str(out / found[1]), word) for word in words]
        words += [str(word) for word in (*own, "--out", out / name)]
        needs = tuple(named if "/" in name else before)
        if not recipe:
            return Run(name, out / name, [sys.executable, *words], 0, needs, False, product="manifest.json")
        file, config_type = recipes(recipe)
        start = [file] if study.ranks == 1 else ["-m", "kd_core.launch", file]
        config = cli.parse(config_type, words)
        return Run(name, out / name, [sys.executable, *start, *words], config.steps, needs, True, recipe, config, file)

    def prepared(name: str, recipe: str, words: list[str]) -> Run:
        made = job(name, recipe, words)
        before.append(name)
        return made

    def arm_run(arm: str, steps: int, seed: int) -> Run:
        own = study.arm(arm)
        try:
            words = shlex.split(f"{study.flags} {own.flags}")
            return job(f"{arm}/{steps}/{seed}", own.recipe, words, ("--steps", steps, "--seed", seed))
        except ValueError as error:
            raise ValueError(f'arm "{arm}": {error}') from None

    first = []
    if study.teacher is not None:
        first.append(prepared(TEACHER, study.recipe, shlex.split(f"{study.flags} {study.teacher}")))
    for name, command in study.prepare.items():
        script, *words = shlex.split(command)
        first.append(prepared(name, script, words) if script.endswith(".py") else prepared(name, "", [script, *words]))
    runs = [arm_run(*point) for point in interleaved(study)]
    check_alike(study, runs)
    return first + runs


def check_alike(study: Study, runs: Sequence[Run]) -> None:
    """Raises ValueError unless the arms can be compared with the baseline.

    Where the reports are of time, they say in what arms may differ. Where the study is about a method, an arm differs in its
    own flags, and in what its recipe alone has; a default that another recipe sets otherwise would go unseen.
    """
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in study.arms}
    for arm, own in by_arm.items():
        if arm == study.baseline:
            continue
        if study.claim is None:
            time_to_quality.refuse_unlike(_planned(by_arm[study.baseline]), _planned(own), study.may_differ)
            continue
        words = shlex.split(f"{study.arm(arm).flags} {study.arm(study.baseline).flags}")
        said = {word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in words}
        ours, theirs = own[0].fields, by_arm[study.baseline][0].fields
        for name in sorted(set(ours) & set(theirs) - said - set(study.may_differ) - time_to_quality.OF_A_RUN):
            if ours[name] != theirs[name]:
                raise ValueError(
                    f'arm "{arm}" has {name} {ours[name]!r} by its recipe, "{study.baseline}" has {theirs[name]!r}; set it '
                    'in "flags", or in the arm if it is to differ, or name it in "may_differ"'
                )


def _planned(runs: Sequence[Run]) -> list[curves.Run]:
    return [curves.Run(run.folder, run.fields, np.empty(0), np.empty((0, 6)), window_s=None) for run in runs]


def summary(run: Run, metric: str) -> str:
    """A finished run in a few words."""
    if run.product:
        return f"{run.name} is made"
    result = folders.read_record(run.folder)["result"]
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
                may_differ=study.may_differ, same_code=study.same_code, out=out / arm,
            )  # fmt: skip


def still_to_make(runs: Sequence[Run], done: Collection[str]) -> set[str]:
    """Names of the `runs` of arms that are not `done`, and of what was to be prepared for just these."""
    names: set[str] = set()
    for run in reversed(runs):  # what is needed stands before what needs it
        if run.name not in done and ("/" in run.name or run.name in names):
            names |= {run.name, *run.needs}
    return names - set(done)


def restore(runs: Sequence[Run], there: Mapping[str, lean.Lean], out: Path, ranks: int) -> None:
    """The folders of those runs of an arm that stand `there`, as far as lines go: they count as finished.

    Raises:
        ValueError: one of them was made with another recipe, number of ranks or flag; nothing has been written then.
    """
    known = [run for run in runs if "/" in run.name and run.name in there and not (run.folder / "run.json").exists()]
    for run in known:
        record = there[run.name].record
        now = json.loads(lean.from_study(json.dumps(run.fields), out))
        changed = folders.changes(record, {"recipe": Path(run.recipe).stem, "ranks": ranks} | now, run.defaults)
        folders.say_moved(change for change in changed if change.known)
        for change in changed:
            if not change.known:
                raise ValueError(
                    f"{run.name} in runs.json was made with {change}; undo the change, or take that run out"
                )
    for run in known:
        lean.restore(there[run.name], run.folder, out)


def refuse_other_code(
    study: Study, missing: Sequence[Run], there: Mapping[str, lean.Lean], runs: Sequence[Run]
) -> None:
    """Raises ValueError where a run of an arm that is missing would join some that other code has made."""
    records: dict[str, Mapping[str, Any]] = {run.name: there[run.name].record for run in runs if run.name in there}
    records |= {run.name: folders.read_record(run.folder) for run in runs if run.config and jobs.finished(run)}
    made_by = functools.cache(lambda recipe: code.digests(Path(recipe)))
    records |= {
        run.name: {"recipe": Path(run.recipe).stem, "code": made_by(run.start), "commit": "this one"}
        for run in missing
        if run.config
    }
    code.mixed({name: record for name, record in records.items() if "/" in name}, study.same_code)


def check(study: Study, file: Path, runs: Sequence[Run], commit: str) -> None:
    """Runs CHECKED steps of every arm by `commit` and by this code; adds to the study file where all losses are equal.

    Raises:
        ValueError: no such commit, a run that fails, or losses that differ.
    """
    first = {run.arm: run for run in reversed(runs) if "/" in run.name}
    for run in first.values():
        if not Path(run.start).resolve().is_relative_to(ROOT):
            raise ValueError(f"--check: {run.recipe} is no file of this project, so its commits are not known")
    with tempfile.TemporaryDirectory() as place, _checkout(commit, Path(place, "code")) as (there, commit):
        names, losses = [commit], {}
        for arm, run in first.items():
            recipe = Path(run.start).resolve().relative_to(ROOT)
            for root in (there, ROOT):
                names += code.digests(root / recipe, root / "kd_core").values()
            theirs, ours = (
                _checked(run, study, root, root / recipe, Path(place, name, arm))
                for name, root in (("there", there), ("here", ROOT))
            )
            for step, (was, now) in enumerate(zip(theirs, ours, strict=True), 1):
                if was != now:
                    raise ValueError(
                        f'--check {commit}, arm "{arm}": step {step} has {was} there and {now} here; runs of the two are not mixed'
                    )
            losses[arm] = ours
            say(f"{arm}: {CHECKED} steps are equal to the last digit")
    digest = hashlib.sha256(json.dumps(losses).encode()).hexdigest()[:16]
    entries = json.loads(file.read_text())
    same = [*entries.get("same_code", []), [*dict.fromkeys(names), digest]]
    write_study(file, entries | {"same_code": same})
    say(f"{commit} computes what this code does: added to {file}")


def _checked(run: Run, study: Study, root: Path, recipe: Path, out: Path) -> list[dict[str, Any]]:
    """The losses of `run`'s first steps by the code in `root`."""
    words = [str(recipe) if word == run.start else word for word in run.command]
    words += f"--steps {CHECKED} --log-every 1 --eval-every {CHECKED} --out".split() + [str(out)]
    environment = os.environ | {"PYTHONPATH": str(root), "NUM_GPUS": str(study.ranks)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--check: {run.arm} by {recipe}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return [{name: line[name] for name in ("loss", study.metric) if name in line} for line in folders.read_run(out)[1]]


@contextlib.contextmanager
def _checkout(commit: str, folder: Path) -> Iterator[tuple[Path, str]]:
    """The project as it was at `commit`, in `folder`; and that commit's whole name."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--check {commit}: {(done.stderr.strip().splitlines() or ['git failed'])[-1]}")
        return done.stdout.strip()

    whole = git("rev-parse", "--verify", f"{commit}^{{commit}}")
    git("worktree", "add", "--detach", str(folder), whole)
    try:
        yield folder, whole
    finally:
        git("worktree", "remove", "--force", str(folder))


def made_with(
    runs: Sequence[Run], there: Mapping[str, lean.Lean], out: Path
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The runs that have begun, in their folders or `there`, for `jobs.check_inputs`.

    Their flags without those that name what the study in `out` has prepared: in a later clone that may be made anew.
    """
    for run in runs:
        begun = (run.folder / "run.json").exists()
        if run.config and (begun or run.name in there):
            fields = {
                name: value
                for name, value in run.fields.items()
                if lean.HERE not in lean.from_study(json.dumps(value), out)
            }
            yield run.name, fields, folders.read_record(run.folder) if begun else there[run.name].record


def main() -> None:
    parser = cli.OneLineParser(prog="python -m kd_core.study", description=__doc__.split("\n")[0])
    parser.add_argument(
        "study",
        type=cli.path,
        metavar="STUDY",
        help="what to run, a file or the folder of a study.json; see the top of kd_core/study.py",
    )
    parser.add_argument(
        "--out", type=cli.path, help="folder of the runs; default runs/study/<name of the file, or folder>"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, or why it is refused, and end")
    parser.add_argument(
        "--check", metavar="COMMIT", help=f"compare {CHECKED} steps of every arm with those of that commit, and end"
    )
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one a GPU, or one without a GPU")
    with cli.one_line_errors():
        args = parser.parse_args()
        file = study_file(args.study)
        study = read_study(file)
        where = args.study.resolve()
        below = where.parts[where.parts.index("results") + 1 :] if "results" in where.parts else ()
        out = args.out or Path("runs/study", "_".join(part for part in below if part != "methods") or where.stem)
        runs, at_once = design(study, out), jobs.places(args.jobs, study.ranks)
        if out.exists() and not (out / "study.json").is_file() and (out.is_file() or list(out.glob("[!.]*"))):
            raise ValueError(f"--out {out} exists and holds no study; choose another folder")
        lines = args.study if args.study.is_dir() else out
        there = lean.read(lines)
        moved = []
        for run in runs:
            if run.config:
                moved += jobs.check_unchanged(
                    run, run.fields, recipe=Path(run.recipe).stem, ranks=study.ranks, defaults=run.defaults
                )
        folders.say_moved(moved)
        jobs.check_inputs(made_with(runs, there, out))
        done = {run.name for run in runs if jobs.finished(run) or ("/" in run.name and run.name in there)}
        missing = [run for run in runs if run.name in still_to_make(runs, done)]
        say(
            f"{len(runs)} runs of {len(study.arms)} arms into {out}; {len(missing)} to make, "
            f"{sum(run.steps for run in missing)} steps"
        )
        if args.check:
            return check(study, file, runs, args.check)
        refuse_other_code(study, missing, there, runs)
        if args.dry_run:
            return
        out.mkdir(parents=True, exist_ok=True)
        with jobs.locked(out) as lock:
            restore(runs, there, out, study.ranks)
            if file != out / "study.json":
                files.write_atomic(out / "study.json", file.read_text())

            def collect() -> None:
                made = {run.name: lean.of_run(run.folder, out) for run in runs if jobs.finished(run)}
                lean.write(lines, there | made)

            def told(run: Run) -> str:
                collect()
                return summary(run, study.metric)

            def look() -> None:
                jobs.check_inputs(made_with(runs, there, out))

            left = [run for run in runs if "/" in run.name or run in missing]
            jobs.run_all(left, at_once, lock, told, out, look=look)
            collect()
            there = lean.read(lines)
            if study.claim is None:
                with contextlib.redirect_stdout(None):
                    write_reports(study, out, out / REPORT)
                print(compare.told_saved(study, there) if len(study.all_lengths) > 1 else compare.told(study, there))
                print(f"times to equal quality, and pictures: {out / REPORT}")
            else:
                print(compare.told(study, there))


if __name__ == "__main__":
    end_process(main)
