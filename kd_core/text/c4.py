"""C4 from the Hugging Face hub: 1024 shards, each downloaded, tokenised and packed by a background process when needed."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd_core.system import checked
from kd_core.system.files import write_atomic
from kd_core.system.hub import hub_file
from kd_core.system.terminal import one_line, say
from kd_core.text import documents
from kd_core.text.packing import VALIDATION_ROWS, Packer, Report

REPOSITORY = "allenai/c4"
NUM_SHARDS = 1024
VALIDATION_FILE = "en/c4-validation.00000-of-00008.json.gz"
DEFAULT_TOKENIZER = "google-bert/bert-base-uncased"


POLL_S = 0.05

_sound: set[Path] = set()  # shards that this process has looked at
_workers: list[subprocess.Popen[bytes]] = []  # of this process; those that have ended are reaped


def train_file(shard: int) -> str:
    return f"en/c4-train.{shard:05d}-of-{NUM_SHARDS:05d}.json.gz"


def build_validation(folder: Path, packer: Packer, progress: bool) -> None:
    """Downloads the first validation file into `folder` as packed rows, with what the workers need beside it."""
    report = Report("tokenising c4 validation", progress)
    path = hub_file(REPOSITORY, VALIDATION_FILE)
    digests = np.fromiter((documents.text_digest(text) for text in documents.read_file(path)), dtype=np.uint64)
    np.save(folder / "validation_digests.npy", digests)
    packer.save(folder)
    if not packer.write(folder / "validation.bin", documents.read_file(path), max_rows=VALIDATION_ROWS, report=report):
        raise ValueError(f"--data c4: {VALIDATION_FILE} does not fill one sequence of {packer.seq_len} tokens")
    report.close("its training shards follow in the background")


def build_shard(folder: Path, shard: int) -> None:
    """Downloads, tokenises and packs one training shard into `folder`; runs in a process of its own.

    Raises:
        ValueError: the shard cannot be had.
    """
    packer = Packer.load(folder)
    with checked.reading(known := folder / "validation_digests.npy", f"remove {folder}"):
        held_out = set(np.load(known).tolist())
    path = hub_file(REPOSITORY, train_file(shard))
    texts = (text for text in documents.read_file(path) if documents.text_digest(text) not in held_out)
    new = Shards(folder, packer).path(shard).with_suffix(".new")
    if not packer.write(new, texts):
        raise ValueError(f"--data c4: {path.name} does not fill one sequence of {packer.seq_len} tokens")
    seal, made = new.with_suffix(".sha256"), checked.digests(folder, [new.name])[new.name]
    if seal.exists() and seal.read_bytes() != made.encode():  # runs that have read it would go on with other text
        raise ValueError(f"--data c4: {path.name} is no longer what {new.with_suffix('.bin')} was; remove {folder}")
    write_atomic(seal, made)
    new.rename(new.with_suffix(".bin"))


@dataclass(frozen=True)
class Shards:
    """C4's training shards, each made by a background process when it is first asked for.

    A shard's worker holds an exclusive lock on the shard's lock file for as long as it lives. So all ranks of a node, and
    all runs, see whether a shard is being made, and a worker that was killed leaves nothing behind that must be cleaned.
    """

    folder: Path
    packer: Packer
    progress: bool = False
    num_shards: int = NUM_SHARDS

    def path(self, shard: int) -> Path:
        return self.folder / f"train-{shard:05d}.bin"

    def open(self, shard: int) -> np.ndarray:
        """Waits until the shard is there, made anew if it is damaged. A worker that failed for somebody else is given a second
        chance.

        Raises:
            ValueError: the worker that was started here failed, with its message.
        """
        path, started = self.path(shard), False
        while not self._is_sound(shard):
            with self._lock(shard) as lock:
                if lock is not None and not self._is_sound(shard):
                    if path.exists():
                        say(f"{path} is damaged: making it anew")
                        path.unlink()
                    if started:
                        raise ValueError(self._failure(shard))
                    if self.progress:
                        say(f"downloading and tokenising {train_file(shard)} of {REPOSITORY}")
                    self._start_worker(shard, lock)
                    started = True
            time.sleep(POLL_S)
        return self.packer.open(path)

    def _is_sound(self, shard: int) -> bool:
        """Whether the shard is there, as its worker wrote it; this process looks once."""
        path = self.path(shard)
        if path in _sound or not path.exists():
            return path.exists()
        seal = path.with_suffix(".sha256")
        made = checked.digests(path.parent, [path.name])[path.name]
        if not seal.exists():  # of an earlier version, or lost
            write_atomic(seal, made)
        if seal.read_bytes() == made.encode():
            _sound.add(path)
        return path in _sound

    def request(self, shard: int) -> None:
        """Starts a worker unless the shard is there or being made."""
        if self.path(shard).exists():
            return
        with self._lock(shard) as lock:
            if lock is not None and not self.path(shard).exists():
                self._start_worker(shard, lock)

    def _start_worker(self, shard: int, lock: int) -> None:
        self._message(shard).unlink(missing_ok=True)
        import_path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "kd_core.text.c4", str(self.folder), str(shard), str(self._message(shard))],
            env=os.environ | {"PYTHONPATH": import_path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # The worker inherits the lock, which lasts until its last holder has gone.
            pass_fds=[lock],
        )
        _workers[:] = [other for other in _workers if other.poll() is None] + [worker]

    @contextmanager
    def _lock(self, shard: int) -> Iterator[int | None]:
        """The shard's lock as a file descriptor; None while another process has it, which is then making the shard."""
        with self.path(shard).with_suffix(".lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            except OSError as error:
                text = f"--data c4: {file.name} cannot be locked ({error.strerror}); set KD_CACHE to a folder of this machine"
                raise ValueError(text) from None
            else:
                yield file.fileno()

    def _message(self, shard: int) -> Path:
        return self.path(shard).with_suffix(".error")

    def _failure(self, shard: int) -> str:
        try:
            return self._message(shard).read_text().strip()
        except FileNotFoundError:
            return f"--data c4: the worker for {train_file(shard)} ended without a message; is there enough memory?"


def _worker(folder: str, shard: str, message: str) -> int:
    """The background process: python -m kd_core.text.c4 FOLDER SHARD MESSAGE-FILE. Training goes first on a busy machine."""
    os.nice(10)
    try:
        build_shard(Path(folder), int(shard))
    except (OSError, ValueError) as error:
        Path(message).write_text(f"{one_line(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_worker(*sys.argv[1:]))
