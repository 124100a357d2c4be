"""Files and folders that are complete or absent, and the cache of what was computed once."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

CACHE_FORMAT = 1  # raise it when other bytes would be written for the same source, tokenizer and settings
# What of an OSError means that a folder cannot be written.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


# --------------------------------------------------------------------------------------------------------------- cache


def cache_root() -> Path:
    return Path(os.environ.get("KD_CACHE") or "~/.cache/kd_recipes").expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Makes `folder` by `build(new folder)`, once for all processes; complete or absent.

    Raises:
        ValueError: the cache cannot be written; and whatever `build` raises.
    """
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(folder.name + ".lock")):
            if folder.is_dir():
                return
            # The lock is ours, so what is there was left by a process that was killed.
            new = folder.with_name(folder.name + ".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            try:
                build(new)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise ValueError(
            f"the cache {folder.parent} cannot be written ({error.strerror}); make room, or set KD_CACHE to another folder"
        ) from error


def cache_key(*parts: str | int) -> str:
    return hashlib.sha256(json.dumps([CACHE_FORMAT, *parts]).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def sync(path: Path) -> None:
    """Forces a file or folder onto the disk, so that a rename cannot be seen before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(folder: Path, *savers: Callable[[Path], Any]) -> None:
    """Has `savers` write into a hidden folder, which is there, then renames it to `folder`: complete or absent."""
    hidden = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    for save in savers:
        save(hidden)
    shutil.rmtree(folder, ignore_errors=True)
    hidden.rename(folder)


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
