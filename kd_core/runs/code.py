"""Which code made a run, and whether runs stand in one report that different code made.

run.json has, under "code", a digest of what computes: of kd_core, less what only reads runs, and of the recipe's file. Runs compute
the same where these are equal, or where a study's "same_code" says that a check has found so (python -m kd_core.study STUDY
--check COMMIT): an entry holds names of code that computes the same, commits or digests, and last a digest of the losses compared.

Of runs that are older than this entry the commit alone is known. They are told together, with a note if their commits differ and
were not checked, but no run that has the entry is told with them unless a check says so. This is about losses: seconds compare on
one machine only, which the reports' own comparison of `hardware` and `world_size` holds.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CORE = Path(__file__).resolve().parents[1]
# By these no run computes: they plan runs, or read what they said.
READERS = {
    "study.py",
    "compare.py",
    "plan.py",
    "time_to_quality",
    "runs/code.py",
    "runs/design.py",
    "runs/lean.py",
}
SOURCES = {".py", ".c", ".h"}
Same = Sequence[Sequence[str]]


def digests(recipe: Path, core: Path = CORE) -> dict[str, str]:
    """Of what a run of the file `recipe` computes by."""
    return {"kd_core": _of_core(core), "recipe": hashlib.sha256(recipe.read_bytes()).hexdigest()[:16]}


@functools.cache
def _of_core(core: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(core.rglob("*")):
        name = file.relative_to(core)
        names = {str(name), *map(str, name.parents)}
        if file.suffix in SOURCES and not names & READERS and not name.name.startswith("bench"):
            digest.update(f"{name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def resumed(before: Mapping[str, Any], now: Mapping[str, str]) -> dict[str, str]:
    """The code of a run that was begun as its run.json `before` says, and goes on by `now`: that of no other where they differ."""
    was = before.get("code") or dict.fromkeys(now, str(before.get("commit", "unknown")))
    return {part: name if was[part] == name else f"{was[part]}, then {name}" for part, name in now.items()}


def mixed(records: Mapping[str, Mapping[str, Any]], same: Same = ()) -> list[str]:
    """What a report is to say of its runs' code: nothing, or in one note that it was not checked.

    Args:
        records: run.json of each run, by its name; of a recipe's file the runs of one recipe are compared.
        same: a study's "same_code".

    Raises:
        ValueError: runs of code that differs, and of which no check says that it computes the same.
    """
    seen: dict[str, dict[str, str]] = {}  # by part, then by name of the code: a run
    for name, record in records.items():
        own = record.get("code") or dict.fromkeys(("kd_core", "recipe"), str(record.get("commit", "unknown")))
        for part, made_by in own.items():
            where = part if part == "kd_core" else f"recipe {record.get('recipe')}"
            seen.setdefault(where, {}).setdefault(_first_of_the_same(made_by, same), name)
    for part, runs in seen.items():
        known = {name for name in runs.values() if "code" in records[name]}
        if len(runs) > 1 and known:
            one, other = (
                list(runs.values())[:2] if len(known) == len(runs) else (min(known), min({*runs.values()} - known))
            )
            raise ValueError(
                f"{one} and {other} were made by code that differs in {part} (commits {_commit(records[one])} and "
                f"{_commit(records[other])}): leave one out, or have it checked that both compute the same, in a study by "
                "python -m kd_core.study STUDY --check COMMIT"
            )
    commits = max((len(runs) for runs in seen.values()), default=1)
    return [f"Runs of {commits} commits are mixed, and were not checked to compute the same."] if commits > 1 else []


def _first_of_the_same(name: str, same: Same) -> str:
    group = {name}
    while more := {other for names in same if group & set(names[:-1]) for other in names[:-1]} - group:
        group |= more
    return min(group)


def _commit(record: Mapping[str, Any]) -> str:
    commit, _, rest = str(record.get("commit", "unknown")).partition("-")
    return commit[:12] + ("-" + rest if rest else "")
