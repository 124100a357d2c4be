"""What a study is to run: its file, read and checked. The head of kd_core/study.py says what the entries mean."""

import dataclasses
import functools
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kd_core.system.files import write_atomic

TEACHER, REPORT = "teacher", "report"  # folders of the study beside those of the arms
NO_ARM = (TEACHER, f"{TEACHER}.log", REPORT, "study.json", "runs.json", "runs.csv")
NAME = re.compile(r"\w[\w.+-]*")
CLAIM = {"arm", "against", "setting", "criterion", "paper"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """Flags over the study's, the recipe they are for, and the seeds and lengths of its runs."""

    flags: str
    recipe: str
    seeds: list[int]
    lengths: list[int]


@dataclasses.dataclass(frozen=True)
class Study:
    """The study file's entries; the module's docstring says what they mean."""

    recipe: str
    arms: dict[str, Any]
    baseline: str
    lengths: list[int]
    seeds: list[int]
    flags: str = ""
    teacher: str | None = None
    prepare: dict[str, str] = dataclasses.field(default_factory=dict)
    metric: str = "eval/loss"
    lower_is_better: bool | None = None
    may_differ: Sequence[str] = ()
    ranks: int = 1
    claim: dict[str, str] | None = None
    same_code: Sequence[Sequence[str]] = ()
    predicted: Sequence[Sequence[str]] = ()

    def arm(self, name: str) -> Arm:
        own = self.arms[name] if isinstance(self.arms[name], dict) else {"flags": self.arms[name]}
        return Arm(**{"flags": "", "recipe": self.recipe, "seeds": self.seeds, "lengths": self.lengths} | own)

    @property
    def all_lengths(self) -> list[int]:
        """Of any arm, in the order of running."""
        own = (self.arm(arm).lengths for arm in self.arms)
        return list(dict.fromkeys(itertools.chain(self.lengths, *own)))

    @property
    def shared_lengths(self) -> list[int]:
        """Those of the baseline at which another arm has runs, ascending."""
        others = {steps for arm in self.arms if arm != self.baseline for steps in self.arm(arm).lengths}
        return sorted(others.intersection(self.arm(self.baseline).lengths))

    def __post_init__(self) -> None:
        def different(values: Any, least: int) -> bool:
            whole = isinstance(values, list) and all(type(value) is int and value >= least for value in values)
            return whole and 0 < len(values) == len(set(values))

        def are_flags(text: Any) -> bool:
            try:
                return isinstance(text, str) and shlex.split(text) is not None
            except ValueError:  # a quote that does not close
                return False

        def is_arm(entry: Any) -> bool:
            if not isinstance(entry, dict):
                return are_flags(entry)
            wrong = set(entry) - {field.name for field in dataclasses.fields(Arm)}
            runs = different(entry.get("seeds", [0]), 0) and different(entry.get("lengths", [1]), 1)
            return not wrong and are_flags(entry.get("flags", "")) and isinstance(entry.get("recipe", ""), str) and runs

        def named(entries: Any, least: int, ok: Callable[[Any], bool]) -> bool:
            known = isinstance(entries, dict) and all(NAME.fullmatch(name) and name not in NO_ARM for name in entries)
            return known and len(entries) >= least and all(map(ok, entries.values()))

        def texts(rows: Any) -> list[Any]:
            """The rows, or one that is too short for what is no list of lists of texts."""
            ok = isinstance(rows, Sequence) and all(
                isinstance(row, list) and all(isinstance(text, str) for text in row) for row in rows
            )
            return list(rows) if ok else [[]]

        claim = self.claim if isinstance(self.claim, dict) else {}
        arms = self.arms if isinstance(self.arms, dict) else {}
        claim_ok = set(claim) == CLAIM and all(isinstance(text, str) for text in claim.values())
        names = f"names (not {' or '.join(NO_ARM)})"
        fields_ok = isinstance(self.may_differ, Sequence) and all(isinstance(name, str) for name in self.may_differ)
        checks = {
            "recipe": (isinstance(self.recipe, str), "the file of a recipe"),
            "arms": (named(arms, 2, is_arm), f"two or more {names}, each with its flags as one text"),
            "baseline": (self.baseline in list(arms), f"one of the arms {list(arms)}"),
            "lengths": (different(self.lengths, 1), "a list of different numbers of steps"),
            "seeds": (different(self.seeds, 0), "a list of different seeds"),
            "flags": (are_flags(self.flags), "flags as one text, its quotes closed"),
            "teacher": (self.teacher is None or are_flags(self.teacher), "flags as one text, its quotes closed"),
            "prepare": (
                named(self.prepare, 0, lambda text: are_flags(text) and text.split())
                and not set(self.prepare) & set(arms),
                f"{names} of no arm, each with its command's words",
            ),
            "metric": (isinstance(self.metric, str), "the name of an evaluation metric, such as eval/loss"),
            "lower_is_better": (isinstance(self.lower_is_better, bool | None), "true or false"),
            "may_differ": (not isinstance(self.may_differ, str) and fields_ok, "a list of fields of the runs' config"),
            "same_code": (all(len(names) > 2 for names in texts(self.same_code)), "a list of what `--check` has found"),
            "predicted": (
                all(len(row) == 3 for row in texts(self.predicted)),
                "a list of what, how it is read from the lines, and the value expected, three texts each",
            ),
            "claim": (self.claim is None or claim_ok, f"an object of the texts {', '.join(sorted(CLAIM))}"),
            "ranks": (type(self.ranks) is int and self.ranks > 0, "a number of processes, at least 1"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise ValueError(f'"{name}" must be {allowed}, got {json.dumps(getattr(self, name))}')
        for arm in arms:
            if not set(self.arm(arm).lengths) & set(self.arm(self.baseline).lengths):
                raise ValueError(
                    f'"arms": "{arm}" has no length that the baseline has, {self.arm(self.baseline).lengths}'
                )
        for entry in ("arm", "against") if claim else ():
            if claim[entry] not in arms:
                raise ValueError(f'"claim": "{entry}" must be one of the arms {list(arms)}, got "{claim[entry]}"')


def study_file(path: Path) -> Path:
    """The study file that `path` is, or holds as study.json."""
    return path / "study.json" if path.is_dir() else path


def read_study(file: Path) -> Study:
    """The study that `file` describes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, an unknown or a missing entry, a value that is not allowed.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a study file such as launch/example_study.json")
    fields = dataclasses.fields(Study)
    needed = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    try:
        entries = json.loads(file.read_text())
        wrong = sorted(needed - set(entries)) + sorted(set(entries) - {field.name for field in fields})
        if wrong:
            known = ", ".join(field.name for field in fields)
            problem = "lacks" if wrong[0] in needed else "has an unknown entry"
            raise ValueError(f'{problem} "{wrong[0]}"; its entries are {known}')
        return Study(**entries)
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def write_study(file: Path, entries: dict[str, Any]) -> None:
    """A study file with an entry, an arm or a row of a table a line."""

    def told(value: Any) -> str:
        text = functools.partial(json.dumps, ensure_ascii=False)
        if isinstance(value, dict):
            return "{\n" + ",\n".join(f"    {text(name)}: {text(one)}" for name, one in value.items()) + "\n  }"
        if isinstance(value, list) and value and isinstance(value[0], list):
            return "[\n" + ",\n".join(f"    {text(row)}" for row in value) + "\n  ]"
        return text(value)

    lines = ",\n".join(f"  {json.dumps(name)}: {told(value)}" for name, value in entries.items())
    write_atomic(file, "{\n" + lines + "\n}\n")


def interleaved(study: Study) -> Iterator[tuple[str, int, int]]:
    """(arm, steps, seed) in the order of running: arms innermost, their order rotated from block to block.

    So a machine that drifts hits all arms alike, and after each seed there is a complete, if small, design.
    """
    arms = list(study.arms)
    seeds = dict.fromkeys(itertools.chain(study.seeds, *(study.arm(arm).seeds for arm in arms)))
    for i, seed in enumerate(seeds):
        for j, steps in enumerate(study.all_lengths):
            first = (i + j) % len(arms)
            turn = [(arm, study.arm(arm)) for arm in arms[first:] + arms[:first]]
            yield from ((arm, steps, seed) for arm, own in turn if seed in own.seeds and steps in own.lengths)
