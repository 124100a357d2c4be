"""Run folders: claimed, checked on resume, described, read.

A run.json is sealed; it names the run by a number of its own, which its checkpoints repeat, and of a finished run it has the
digests of metrics.jsonl and of all that was exported.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kd_core.cli import FREE_ON_RESUME
from kd_core.runs.flags import RunFlags
from kd_core.system import checked, ranks
from kd_core.system.files import InUse, Unwritable, hold, write_atomic
from kd_core.system.terminal import say

EXPORTS = ("hf", "best")
# All that a run, or a chain of them, makes before that file.
BEFORE_RUN_JSON = {"checkpoints", "checkpoints/.lock", ".lock", ".run.json.tmp"}
# Flags that name what may have been moved, and the entry of run.json that says whether it is the same; of "models" the engine's.
MAY_MOVE = {"data": "data", "tokenizer": "data", "teachers": "teachers", "deepspeed_config": "deepspeed"}
MAY_MOVE |= {"teacher_deepspeed_config": "teacher_deepspeed", "student": "models", "teacher": "models"}
MARK = 16  # characters of a teacher's fingerprint
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "datasets", "tokenizers", "torchvision")


def check_folder(cfg: RunFlags) -> dict[str, Any]:
    """run.json of the run to resume, {} for a new run.

    Raises:
        ValueError: `--out` holds a run and --resume is not set, or the reverse, or a changed flag would alter it.
    """
    folder = Path(cfg.out or "")
    if cfg.out is None and cfg.resume:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    if cfg.resume:
        return _check_resumed(cfg, folder)
    if cfg.out and (folder / "run.json").exists():
        raise ValueError(f"--out {folder} holds a run; add --resume to continue it, or choose another folder")
    if cfg.out and folder.exists() and (not folder.is_dir() or foreign(folder)):
        raise ValueError(f"--out {folder} exists and is not an empty folder; choose another folder")
    return {}


def foreign(folder: Path) -> list[str]:
    """What lies in a folder without run.json, and is not of a run that was killed before it had written that."""
    paths = [*folder.glob("*"), *(folder / "checkpoints").glob("*")]  # no deeper: it may be the root of a disk
    return sorted({str(path.relative_to(folder)) for path in paths} - BEFORE_RUN_JSON)


def says_finished(cfg: RunFlags) -> bool:
    """Whether `--resume` names a run that has finished; says so. Every rank must ask, before joining the others."""
    finished = cfg.resume and check_folder(cfg).get("result", {}).get("stopped") == "finished"
    if finished and ranks.local_rank() == 0:
        print(f"{cfg.out} has finished; there is nothing to resume")
    return finished


def claim_folder(cfg: RunFlags, recipe: str, undo: contextlib.ExitStack) -> Path:
    """The run folder: `--out`, or the next free number under runs/<recipe>; `undo` takes away what is made here.

    Rank 0 claims it; the other ranks get its answer by broadcast, once all have joined.

    Raises:
        ValueError: as `check_folder`.
        InUse: another run writes there.
        Unwritable: the folder cannot be made or written.
    """
    if ranks.rank() != 0:
        return Path()
    before = check_folder(cfg)
    folder = Path(cfg.out or "")
    try:
        if cfg.resume:
            say_changes(before)
            say_moved(changes(before, dataclasses.asdict(cfg)))
            hold_folder(folder)
            return folder
        new = cfg.out is None or not folder.exists()
        if cfg.out is None:
            parent = Path("runs") / recipe
            for made in (path for path in (parent.parent, parent) if not path.exists()):
                undo.callback(remove_if_empty, made)
            folder = next_free(parent)
        folder.mkdir(parents=True, exist_ok=True)
        for made in [folder] * new + [lock_of(folder).parent]:
            undo.callback(remove_if_empty, made)
        hold_folder(folder)  # from here on it is nobody else's, who may have begun at the same moment
        if (folder / "run.json").exists():
            raise ValueError(f"--out {folder} holds a run by now; choose another folder")
        if new:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        undo.callback((folder / "run.json").unlink, missing_ok=True)
        undo.callback(shutil.rmtree, folder / "checkpoints", ignore_errors=True)
        write_record(folder, describe(recipe, cfg))
    except InUse:
        raise
    except OSError as error:
        number = error.errno or errno.EIO
        text = f"--out {folder} cannot be written ({os.strerror(number)}); make that possible, or choose a folder on a disk with room"
        raise Unwritable(number, text, str(folder)) from None
    return folder


def lock_of(folder: Path) -> Path:
    """What the processes of a run hold, so that no second ones write into its folder."""
    return folder / "checkpoints" / ".lock"


def hold_folder(folder: Path) -> None:
    """
    Raises:
        InUse: another run writes there.
    """
    hold(lock_of(folder), f"--out {folder}")


def remove_if_empty(folder: Path) -> None:
    """For what was made before anything was put into it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def next_free(parent: Path) -> Path:
    """Makes and returns the folder with the number after the largest; another run may take one at the same moment."""
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(child.name) for child in parent.iterdir() if child.name.isdecimal()), default=0)
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            (parent / str(number)).mkdir()
            return parent / str(number)


def _check_resumed(cfg: RunFlags, folder: Path) -> dict[str, Any]:
    if not (folder / "run.json").exists():
        raise ValueError(f"--resume: --out {folder} holds no run (no run.json); leave out --resume to start one")
    before = read_record(folder)
    for change in changes(before, dataclasses.asdict(cfg), dataclasses.asdict(type(cfg)())):
        if not change.known:
            raise ValueError(
                f"--resume: {change.flag} was {change.was!r} and is now {change.now!r}, which would alter the run; "
                f"leave {change.flag} out, or start a new run in another --out"
            )
    if before["world_size"] != ranks.world_size():
        raise ValueError(
            f"--resume: the run had {before['world_size']} rank(s), now {ranks.world_size()}; use as many as before"
        )
    return before


class Change(NamedTuple):
    """A field of a run's config that is another now, and would alter the run.

    Args:
        known: whether it names what the run knows by its content, so that it may have been moved: who reads it will tell.
    """

    name: str
    was: Any
    now: Any
    known: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def __str__(self) -> str:
        return f"{self.name} {json.dumps(self.was)}, now it is {json.dumps(self.now)}"


def changes(
    record: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[Change]:
    """What of `now`, a config, is other than in the run of `record`. Its recipe and ranks are asked for by these names.

    Args:
        defaults: what fields were that had no flag yet when the run was made.
    """
    was = dict(defaults or {}) | {"recipe": record["recipe"], "ranks": record["world_size"]} | record["config"]
    was, now = json.loads(json.dumps([was, now]))
    return [
        Change(name, was.get(name), value, _is_known(name, value, record))
        for name, value in now.items()
        if name not in FREE_ON_RESUME and was.get(name) != value
    ]


def _is_known(name: str, value: Any, record: Mapping[str, Any]) -> bool:
    content: Any = record.get(MAY_MOVE.get(name, ""))
    if name == "teachers":
        return bool(content) and len(content) == len(value) and all("fingerprint" in one for one in content)
    if MAY_MOVE.get(name) == "models":
        return name in (content or {})
    return content is not None


def say_moved(changed: Iterable[Change]) -> None:
    """Says once what is looked for elsewhere than before."""
    for flag, was, now in dict.fromkeys((one.flag, str(one.was), str(one.now)) for one in changed):
        say(f"{flag} was {was} and is now {now}: taken if its content is the same")


def mark(told: Mapping[str, Any]) -> str:
    """The fingerprint of a teacher, short; of one that has none, that of nothing."""
    whole = told.get("fingerprint")
    if isinstance(whole, str) and len(whole) <= MARK:
        return whole
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:MARK]


def check_data(cfg: RunFlags, fingerprint: str) -> None:
    """Raises ValueError when a run is resumed on other data than it began with."""
    before = check_folder(cfg).get("data", fingerprint) if cfg.resume else fingerprint
    if before != fingerprint:
        raise ValueError("--resume: --data does not hold what the run began with; restore it, or start a new run")


def check_deepspeed(cfg: RunFlags, field: str, content: Mapping[str, Any]) -> None:
    """Raises ValueError when a run is resumed with a file of --deepspeed-config, or of another `field`, that says something else by now."""
    before = check_folder(cfg).get(MAY_MOVE[field], content) if cfg.resume else content
    for name in sorted(before.keys() | content.keys()):
        if before.get(name) != content.get(name):
            raise ValueError(
                f"--resume: --{field.replace('_', '-')} {getattr(cfg, field)} has {name} {json.dumps(content.get(name))}, the run began with "
                f"{json.dumps(before.get(name))}; undo that, or start a new run in another --out"
            )


def describe(recipe: str, config: Any) -> dict[str, Any]:
    """The head of run.json: what was asked for, and with what it runs."""
    return {
        "recipe": recipe,
        "id": secrets.token_hex(8),
        "config": dataclasses.asdict(config),
        "argv": sys.argv,
        **_machine(),
        "commit": _commit(),
        "world_size": ranks.world_size(),
    }


def _machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": {
            "device": "cuda" if cuda else "cpu",
            "name": torch.cuda.get_device_name() if cuda else _cpu_name(),
            "count": torch.cuda.device_count() if cuda else os.cpu_count(),
        },
        "threads": torch.get_num_threads(),
    }


def say_changes(before: Mapping[str, Any]) -> None:
    """Says what a resumed run computes with that is other than before: sums may be rounded otherwise."""
    was, now = (
        {**one.get("versions", {}), **one.get("hardware", {}), "threads": one.get("threads")}
        for one in (before, _machine())
    )
    names = ("device", "name", *PACKAGES, *(["threads"] if now["device"] == "cpu" else []))
    changed = [f"{name} {now[name]} (was {was[name]})" for name in names if was.get(name) not in (None, now[name])]
    if changed:
        say(f"--resume: {', '.join(changed)}; the last digits may come out otherwise than without the stop")


def _commit() -> str:
    """The commit of this code, "-dirty" with local changes; "unknown" for a copy without git."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json, at once and atomically."""
    write_atomic(folder / "run.json", json.dumps(checked.sealed(record), indent=2, allow_nan=False) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """
    Raises:
        DamagedError: run.json is not as it was written, or no run's.
        FileNotFoundError: there is none.
    """
    record = checked.read_json(folder / "run.json", recipe=str, config=dict, world_size=int)
    if not isinstance(record.get("result", {}), dict):
        raise checked.DamagedError(folder / "run.json", "its result is no dict")
    return record


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """run.json and the lines of metrics.jsonl.

    Raises:
        DamagedError: one of them is not as it was written, or the lines do not reach from the first evaluation to the result.
        FileNotFoundError: one of them is not there.
    """
    record, log = checked.read_json(folder / "run.json", config=dict), folder / "metrics.jsonl"
    check_files(folder, record, log.name)
    lines = checked.read_lines(log)
    end = (record.get("result") or {}).get("step")
    if end is not None and (not lines or lines[-1].get("step") != end):
        raise checked.DamagedError(log, f"its last line is not that of step {end}, the result's")
    latest = max(record["config"].get(name, math.inf) for name in ("log_every", "eval_every"))
    if lines and lines[0].get("step", 0) > latest:
        raise checked.DamagedError(log, f"its first line is that of step {lines[0]['step']}")
    return record, lines


def check_files(folder: Path, record: Mapping[str, Any], part: str) -> None:
    """Raises DamagedError when files of a finished run, that named `part` or those in it, are not as the run left them."""
    sums = {name: value for name, value in record.get("files", {}).items() if name.split("/")[0] == part}
    checked.check(folder, sums, "restore it, or copy what you want to use as it is elsewhere")


def digests(folder: Path) -> dict[str, str]:
    """Of the files by which others use the run; hidden ones, of editors and file systems, are none of them."""
    parts = [folder / "metrics.jsonl", *(folder / part for part in EXPORTS)]
    files = [file for part in parts for file in ([part] if part.is_file() else sorted(part.rglob("*")))]
    names = [file.relative_to(folder) for file in files if file.is_file()]
    return checked.digests(folder, [str(name) for name in names if not any(part[0] == "." for part in name.parts)])
