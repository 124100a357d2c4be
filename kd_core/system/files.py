"""Files and folders that are complete or absent, and the cache of what was computed once."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from kd_core.system import checked
from kd_core.system.ranks import local_rank
from kd_core.system.terminal import say

CACHE_FORMAT = 1  # raise it when other bytes would be written for the same source, tokenizer and settings
# Suffixes that may hold data and are no reader's: of what is packed, and of other tables and records.
UNREAD = tuple(
    ".zip .7z .rar .tar .tgz .tbz .tbz2 .txz .gz .bz2 .xz .lzma .zst .lz4 .lz .z .br .sz .cab "
    ".arrow .feather .avro .orc .h5 .hdf5 .tfrecord .rec .lmdb .mdb .beton".split()
)
HIDDEN, TWICE, CLOSED = "hidden", "taken already by another name", "packed or of a kind that nothing here reads"
DEEPEST = 200  # folders within each other that are looked into
DIGESTS = "digests.json"  # of the files of a folder of the cache
SECONDS_TO_DIE = 3.0  # a process that was killed frees its locks within
# What of an OSError means that a path cannot be written, and what writers without its number say: PyTorch's, numpy's, Rust's.
FULL = {errno.ENOSPC, errno.EDQUOT}
UNWRITABLE = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EFBIG, errno.EIO}
NO_ROOM = ("No space left", "Not enough free space")
SIGNS = ("inline_container.cc", "PytorchStreamWriter failed", *NO_ROOM, " requested and ")


# ---------------------------------------------------------------------------------------------------------- full disks


class Unwritable(OSError):
    """A path that cannot be written, in words for the user."""

    def __str__(self) -> str:
        return str(self.strerror)


class InUse(Unwritable):
    """What another process holds."""


@contextlib.contextmanager
def writing(path: Path, todo: str = "make room there, then continue with --resume", needs: int = 0) -> Iterator[None]:
    """Within, whatever cannot be written becomes one line: which path, how much was needed, and what to do.

    Args:
        needs: bytes, where they are known; otherwise it was more than what is free now.

    Raises:
        Unwritable: in place of an OSError, and of what libraries raise instead.
    """
    free, _ = _free(path)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = (str(error) or repr(error)).splitlines()[0]
        number, named = getattr(error, "errno", None), getattr(error, "filename", None)
        ours = not named or str(named).startswith(str(path.parent))  # not what was read meanwhile
        if isinstance(error, Unwritable) or not (
            (number in UNWRITABLE and ours) or any(sign in text for sign in SIGNS)
        ):
            raise
        if not number:
            full = _free(path)[0] <= free / 2 or any(sign in text for sign in NO_ROOM)
            number = errno.ENOSPC if full else errno.EIO
        reason = os.strerror(number) if getattr(error, "errno", None) else text
        if number in FULL:
            needed = f"about {shown_bytes(needs)}" if needs else f"more than {shown_bytes(free)}"
            reason = f"{os.strerror(number)}: {needed} needed, {shown_bytes(free)} free"
            if not _free(path)[1]:
                reason = f"{os.strerror(number)}: no file more, as no inode is free"
        raise Unwritable(number, f"{path} cannot be written ({reason}); {todo}", str(path)) from error


def _free(path: Path) -> tuple[int, bool]:
    """Bytes that are free where `path` is or is to be, and whether a file can be made there."""
    try:
        disk = os.statvfs(next(place for place in (path, *path.absolute().parents) if place.exists()))
        return disk.f_bavail * disk.f_frsize, disk.f_favail > 0 or not disk.f_files  # which some do not count
    except OSError:
        return 0, True


def shown_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --------------------------------------------------------------------------------------------------------------- cache


def cache_root() -> Path:
    """$KD_CACHE, or a folder in the user's home; without one, as a container's user may be, among temporary files."""
    try:
        return Path(os.environ.get("KD_CACHE") or "~/.cache/kd_recipes").expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"kd_recipes-{os.getuid()}")


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Makes `folder` by `build(new folder)`, once for all processes; complete or absent, and as it was built.

    Where its bytes are others now, that is said and it is built anew. Local rank 0 looks, once a process: the others wait for it.

    Raises:
        Unwritable: the cache cannot be written; and whatever `build` raises.
    """
    if folder.is_dir() and (folder in _SOUND or local_rank()):
        return
    todo = "make room there, or set KD_CACHE to another folder"
    with contextlib.ExitStack() as undo, writing(folder.parent, todo):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if _damage(folder):
            undo.enter_context(held(folder.with_name(folder.name + ".lock"), str(folder)))
            if damage := _damage(folder):
                if folder.is_dir():
                    say(f"{damage}: building {folder} anew")
                _build(folder, build, undo)
        _SOUND.add(folder)


_SOUND: set[Path] = set()  # folders of the cache that this process has looked at


def _damage(folder: Path) -> str:
    """What of a folder of the cache is not as it was built; "" when it is."""
    try:
        facts = checked.read_json(folder / DIGESTS, of=str, sha256=dict)
        if facts["of"] != folder.name:
            return f"{folder / DIGESTS} is damaged (it is that of {facts['of']})"
        checked.check(folder, facts["sha256"])
    except (ValueError, OSError) as error:
        return str(error).partition(";")[0]
    return ""


def _build(folder: Path, build: Callable[[Path], None], undo: contextlib.ExitStack) -> None:
    # The lock is ours, so what is there was left by a process that was killed.
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    undo.callback(shutil.rmtree, new, ignore_errors=True)
    build(new)
    facts = {"of": folder.name, "sha256": checked.digests(new, sorted(file.name for file in new.iterdir()))}
    write_json(new / DIGESTS, checked.sealed(facts))
    if not folder.is_dir():
        new.rename(folder)
    else:  # which may have more: C4's shards come later
        for file in new.iterdir():
            file.replace(folder / file.name)


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


class Listing:
    """The names of files of data, and what beside them was left out."""

    def __init__(self, is_data: Callable[[str], Any], unread: tuple[str, ...] = ()) -> None:
        """
        Args:
            is_data: whether a name is that of data.
            unread: further suffixes that may hold data, which nothing here reads, besides UNREAD.
        """
        self.names: list[str] = []
        self.left_out: dict[str, list[str]] = {}
        self._is_data, self._unread = is_data, UNREAD + unread

    def add(self, name: str) -> None:
        """Takes `name` if it is data, else leaves it out."""
        if self._is_data(name):
            self.names.append(name)
        else:
            self.leave(name, CLOSED if name.lower().endswith(self._unread) else "of other kinds")

    def leave(self, name: str, why: str) -> None:
        self.left_out.setdefault(why, []).append(name)

    def check(self, source: str) -> None:
        """Says on one line what was left out; raises ValueError if that may hold data. `source` is the flag with its value."""
        if closed := self.left_out.get(CLOSED):
            raise ValueError(
                f"{source} has {_some(closed)} {CLOSED}; unpack or convert what is data, and move the rest elsewhere"
            )
        if self.left_out and os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"{source}: {self}")

    def __str__(self) -> str:
        """Such as: left out 2 hidden (.a, .b), 9 of other kinds (x.md, y.md, z.md, ...)."""
        parts = [f"{len(names)} {why} ({_some(names)})" for why, names in sorted(self.left_out.items())]
        return f"left out {', '.join(parts)}" if parts else "nothing was left out"


def _some(names: list[str]) -> str:
    return ", ".join([*sorted(names)[:3], *["..."][: len(names) > 3]])


def files_below(root: Path, is_data: Callable[[str], Any] = lambda _: True, unread: tuple[str, ...] = ()) -> Listing:
    """The files of data below a folder, by their names from there, a folder's in the order of names.

    The rule for all readers: links are followed, and what lies there by several (by device and inode) is taken once, by its own
    name if it has one. Hidden files and folders (.ipynb_checkpoints, ._scan.jpg) and run folders are left out with all that they
    hold. So is what is neither file nor folder, and what cannot be listed. A link to nothing is a file that cannot be read.
    """
    listing = Listing(is_data, unread)
    found: list[str] = []
    links: list[str] = []
    entered: set[tuple[int, int]] = set()

    def walk(folder: str) -> None:
        path = os.path.join(root, folder)
        try:
            place = _place(path)
            with os.scandir(path) as entries:
                seen = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            listing.leave(folder, f"unreadable, {error.strerror}")
            return
        if place in entered or (entered and _holds_run(path)):
            listing.leave(folder, TWICE if place in entered else "run folders")
            return
        entered.add(place)
        for entry in seen:
            name = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                listing.leave(name, HIDDEN)
            elif entry.is_symlink():
                links.append(name)
            elif entry.is_dir() and name.count(os.sep) > DEEPEST:
                listing.leave(name, f"more than {DEEPEST} folders deep")
            elif entry.is_dir():
                walk(name)
            elif entry.is_file():
                found.append(name)
            else:
                listing.leave(name, "no regular files")

    walk("")
    taken = {_place(os.path.join(root, name)) for name in found} if links else set()
    for name in links:  # grows, when there are links below links
        path = os.path.join(root, name)
        if os.path.isdir(path):
            before = len(found)
            walk(name)
            taken.update(_place(os.path.join(root, other)) for other in found[before:])
        elif not os.path.exists(path):
            found.append(name)
        elif not os.path.isfile(path):
            listing.leave(name, "no regular files")
        elif (place := _place(path)) in taken:
            listing.leave(name, TWICE)
        else:
            taken.add(place)
            found.append(name)
    for name in sorted(found, key=lambda name: name.split(os.sep)):
        listing.add(name)
    return listing


def _place(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _holds_run(folder: str) -> bool:
    try:
        return {"recipe", "config"} <= set(json.loads(Path(folder, "run.json").read_text()))
    except (OSError, ValueError, RecursionError, TypeError):
        return False


_HELD: dict[Path, IO[str]] = {}  # closing one of these files would free its lock


def hold(lock: Path, what: str, seconds: float = SECONDS_TO_DIE) -> None:
    """Locks the file `lock` until `let_go`, or until this process ends, by whatever end; on NFS too. Children do not hold it.

    Again where it is held already: a file that was removed meanwhile is made anew.

    Args:
        what: is in use, in the words of the error.
        seconds: to wait for whoever holds it.

    Raises:
        InUse: a process that is alive holds it.
        OSError: it cannot be made.
    """
    if lock in _HELD and _lies_at(lock, _HELD[lock]):
        return
    deadline = time.monotonic() + seconds
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("a+")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _lies_at(lock, handle):  # not let go of meanwhile
                break
        except OSError as error:
            if says_unlockable(lock, error):
                break
            if time.monotonic() > deadline:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                text = f"{what} is in use by {holder}; wait for its end, stop it, or choose another folder"
                raise InUse(errno.EAGAIN, text, str(lock)) from None
            time.sleep(0.1)
        handle.close()
    _HELD[lock] = handle
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()


def _lies_at(lock: Path, handle: IO[str]) -> bool:
    return lock.exists() and os.path.samestat(os.fstat(handle.fileno()), lock.stat())


def says_unlockable(lock: Path, error: OSError) -> bool:
    """Whether a lock was refused because its file system has none, which is said, rather than because another has it."""
    if error.errno in (errno.EACCES, errno.EAGAIN):
        return False
    say(f"{lock} cannot be locked ({error.strerror}): make sure that nothing else writes there")
    return True


@contextlib.contextmanager
def held(lock: Path, what: str, seconds: float = math.inf) -> Iterator[None]:
    """Within, `hold`."""
    hold(lock, what, seconds)
    try:
        yield
    finally:
        let_go(lock)


def let_go(lock: Path) -> None:
    """Frees what `hold` has locked, and removes the file; nothing where it holds nothing."""
    if lock in _HELD:
        lock.unlink(missing_ok=True)
        _HELD.pop(lock).close()


def replace_folder(folder: Path, *savers: Callable[[Path], Any]) -> None:
    """Has `savers` write into a hidden folder, which is there, then renames it to `folder`: complete or absent.

    What a user keeps in `folder` under other names stays; where it is a link, it is the folder that this names.
    """
    folder = Path(os.path.realpath(folder))
    hidden = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    with writing(folder):
        try:
            hidden.mkdir(parents=True)
            for save in savers:
                save(hidden)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)  # of no use, and in the way on a full disk
            raise
    for kept in folder.iterdir() if folder.is_dir() else ():
        if not (hidden / kept.name).exists():
            kept.rename(hidden / kept.name)
    shutil.rmtree(folder, ignore_errors=True)
    hidden.rename(folder)


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, needs=len(text)):
        temporary.write_text(text)
        temporary.replace(path)
