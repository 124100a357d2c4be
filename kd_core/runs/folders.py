"""Run folders: claimed, checked on resume, described, read."""

import contextlib
import dataclasses
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kd_core.cli import FREE_ON_RESUME
from kd_core.runs.flags import RunFlags
from kd_core.system import ranks
from kd_core.system.files import Unwritable, hold, write_atomic

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
    if cfg.out and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {folder} exists and is not an empty folder; choose another folder")
    return {}


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
        Unwritable: the folder cannot be made or written.
    """
    if ranks.rank() != 0:
        return Path()
    check_folder(cfg)
    folder = Path(cfg.out or "")
    if cfg.resume:
        hold(lock_of(folder), f"--out {folder}")
        return folder
    try:
        if cfg.out is None:
            parent = Path("runs") / recipe
            for made in (path for path in (parent.parent, parent) if not path.exists()):
                undo.callback(remove_if_empty, made)
            folder = next_free(parent)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        elif not folder.exists():
            folder.mkdir(parents=True)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        write_atomic(folder / "run.json", json.dumps(describe(recipe, cfg), indent=2) + "\n")
        undo.callback((folder / "run.json").unlink, missing_ok=True)
        undo.callback(shutil.rmtree, folder / "checkpoints", ignore_errors=True)
        hold(lock_of(folder), f"--out {folder}")
    except OSError as error:
        number = error.errno or errno.EIO
        text = f"--out {folder} cannot be written ({os.strerror(number)}); choose a folder on a disk with room"
        raise Unwritable(number, text, str(folder)) from None
    return folder


def lock_of(folder: Path) -> Path:
    """What the processes of a run hold, so that no second ones write into its folder."""
    return folder / "checkpoints" / ".lock"


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
    before = json.loads((folder / "run.json").read_text())
    now, default = (json.loads(json.dumps(dataclasses.asdict(flags))) for flags in (cfg, type(cfg)()))
    was = default | before["config"]  # a flag that is younger than the run had its default
    for name, value in now.items():
        if name not in FREE_ON_RESUME and was[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--resume: {flag} was {was[name]!r} and is now {value!r}, which would alter the run; "
                f"leave {flag} out, or start a new run in another --out"
            )
    if before["world_size"] != ranks.world_size():
        raise ValueError(
            f"--resume: the run had {before['world_size']} rank(s), now {ranks.world_size()}; use as many as before"
        )
    return dict(before)


def check_data(cfg: RunFlags, fingerprint: str) -> None:
    """Raises ValueError when a run is resumed on other data than it began with."""
    before = check_folder(cfg).get("data", fingerprint) if cfg.resume else fingerprint
    if before != fingerprint:
        raise ValueError("--resume: --data does not hold what the run began with; restore it, or start a new run")


def describe(recipe: str, config: Any) -> dict[str, Any]:
    """The head of run.json: what was asked for, and with what it runs."""
    cuda = torch.cuda.is_available()
    return {
        "recipe": recipe,
        "config": dataclasses.asdict(config),
        "argv": sys.argv,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": _commit(),
        "hardware": {
            "device": "cuda" if cuda else "cpu",
            "name": torch.cuda.get_device_name() if cuda else _cpu_name(),
            "count": torch.cuda.device_count() if cuda else os.cpu_count(),
        },
        "world_size": ranks.world_size(),
    }


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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
