"""Files and folders that are complete or absent, and the cache of what was computed once."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import filelock

from kd_core.system.terminal import say

CACHE_FORMAT = 1  # raise it when other bytes would be written for the same source, tokenizer and settings
# What of an OSError means that a folder cannot be written.
SECONDS_TO_DIE = 3.0  # a process that was killed frees its locks within
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
    """Forces a file or folder onto the disk, so that a rename cannot be seen before what it names.

    Of a folder as far as its file system can: CIFS and many of FUSE's know no such call.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def files_below(root: Path) -> Iterator[Path]:
    """The files below a folder of data, in the order of their names.

    Folders that are links are entered, each folder once, so that a link upwards ends. Left out is what a user would not call data:
    hidden files and folders (.ipynb_checkpoints, ._scan.jpg) and run folders with all that they hold.
    """
    entered: set[str] = set()

    def walk(folder: str) -> Iterator[Path]:
        place = os.path.realpath(folder)
        if place in entered or (entered and _holds_run(folder)):
            return
        entered.add(place)
        with os.scandir(folder) as entries:
            seen = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        for entry in seen:
            yield from walk(entry.path) if entry.is_dir() else (Path(entry.path),)

    return walk(str(root))


def _holds_run(folder: str) -> bool:
    try:
        return {"recipe", "config"} <= set(json.loads(Path(folder, "run.json").read_text()))
    except (OSError, ValueError, TypeError):
        return False


_HELD: dict[Path, IO[str]] = {}  # closing one of these files would free its lock


def hold(lock: Path, what: str) -> None:
    """Locks the file `lock` until `let_go`, or until this process ends, by whatever end; on NFS too. Children do not hold it.

    Args:
        what: is in use, in the words of the error.

    Raises:
        ValueError: a process that is alive holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + SECONDS_TO_DIE
    while True:
        handle = lock.open("a+")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(handle.fileno()), lock.stat()):  # not let go of meanwhile
                break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                say(f"{lock} cannot be locked ({error.strerror}): make sure that no other run writes there")
                break
            if time.monotonic() > deadline:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                text = f"{what} is in use by {holder}; wait for its end, stop it, or choose another folder"
                raise ValueError(text) from None
            time.sleep(0.1)
        handle.close()
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    _HELD[lock] = handle


def let_go(lock: Path) -> None:
    """Frees what `hold` has locked, and removes the file; nothing where it holds nothing."""
    if lock in _HELD:
        lock.unlink(missing_ok=True)
        _HELD.pop(lock).close()


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
