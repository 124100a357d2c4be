"""Teachers' answers, computed once and read by every epoch, seed and experiment that follows.

    python -m kd_core.cache build --teacher RUN --data DATA --out DIR [flags]      resumes where it was killed
    python -m kd_core.cache build --kind images ...                                of image classifiers; mlm is the default
    deepspeed --module kd_core.cache build ...                                     all ranks share the work
    python recipes/bert_kd.py --data DATA --teachers cache:DIR ...

A cache is a folder of records of one size, one for each sample and pattern of its masking or augmentation:

    header.json      what the answers were computed from, and the layout of a record
    part-00000.bin   records in their order; while building, part-00000.json says that it is whole
    manifest.json    checksums of all files; it is written last, so a cache without it is not complete
    build.json       seconds that the build took, summed over ranks
    ...              what the task needs besides, such as the teacher's head (kd_core/cache/mlm.py)

Nothing here knows a task (mlm.py, images.py beside it do). Record `pattern * num_samples + sample` is the same for
any number of ranks, and its bytes follow from the header alone.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from kd_core.system import ranks
from kd_core.system.checked import DamagedError, read_json, sealed
from kd_core.system.files import SECONDS_TO_DIE, file_digest, held, shown_bytes, write_atomic, writing
from kd_core.system.terminal import say
from kd_core.teachers.pool import require_finite
from kd_core.teachers.sources import CACHE_PREFIX as PREFIX

FORMAT = 1
REMEDY = "delete the cache and build it again"
NUM_PARTS, PART_BYTES = 64, 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Layout:
    """The records of a cache.

    Args:
        fields: name, NumPy type and shape of each field of a record.
        num_samples, num_patterns: there is a record for each pair.
        batch_records: records that are computed together.
    """

    fields: Sequence[tuple[str, str, Sequence[int]]]
    num_samples: int
    num_patterns: int
    batch_records: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype([(name, kind, tuple(shape)) for name, kind, shape in self.fields])

    @property
    def num_records(self) -> int:
        return self.num_samples * self.num_patterns

    @property
    def part_records(self) -> int:
        """Records of a part, a multiple of a batch: 64 parts, or more where they would exceed 64 MiB."""
        batches = -(-self.num_records // (NUM_PARTS * self.batch_records))
        most = PART_BYTES // (self.batch_records * self.dtype.itemsize)
        return self.batch_records * max(1, min(batches, most))

    @property
    def parts(self) -> list[range]:
        """Indices of the records of each part."""
        starts = range(0, self.num_records, self.part_records)
        return [range(start, min(start + self.part_records, self.num_records)) for start in starts]

    def batches(self, indices: range) -> list[tuple[np.ndarray, np.ndarray]]:
        """Samples and patterns of the records, int64 [B] each; every batch is full: kernels may choose by the shape."""
        size = self.batch_records
        numbers = (np.resize(indices[start : start + size], size) for start in range(0, len(indices), size))
        return [np.divmod(number, self.num_samples)[::-1] for number in numbers]

    def pack(self, indices: range, answers: Iterable[Mapping[str, Tensor]]) -> np.ndarray:
        """The records, from the fields of each of `batches`, without what only filled the last."""
        records = np.empty(len(indices), self.dtype)
        for start, answer in zip(range(0, len(indices), self.batch_records), answers, strict=True):
            here = records[start : start + self.batch_records]
            for name, values in answer.items():
                bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
                here[name] = bits.cpu().numpy().reshape(-1, *self.dtype[name].shape)[: len(here)]
        return records


CONTINUES = "make room there and repeat the command, which continues it, or choose another --out"

# --- writing ----------------------------------------------------------------------------------------------------------


def build(
    folder: Path,
    settings: Mapping[str, Any],
    layout: Layout,
    answer: Callable[[range], np.ndarray],
    companions: Callable[[Path], None],
    score: Callable[[], dict[str, float]],
) -> None:
    """Fills `folder`, with all ranks, from where an earlier build of the same was killed; call on every rank.

    Args:
        settings: what the answers follow from; JSON values.
        answer: records, of the layout's dtype, of the indices given.
        companions: writes what the task needs besides into the folder given.
        score: of the teacher, for `CachedTeacher.score`; called on rank 0, so that ranks do not change its last digits.

    Raises:
        ValueError: `folder` has a complete cache or one of other settings, another process builds it, the disk lacks room
            or cannot be written, or the teacher's score is not finite.
    """
    header = json.loads(json.dumps({"format": FORMAT, **settings, "layout": dataclasses.asdict(layout)}))
    with writing(folder, CONTINUES), contextlib.ExitStack() as alone:
        if ranks.rank() == 0:
            alone.enter_context(held(folder.with_name(f".{folder.name}.lock"), f"--out {folder}", SECONDS_TO_DIE))
            _require_room(folder, layout)
            _require_ours(folder, header)
            scored = score()
            require_finite(f"the teacher of --out {folder}", scored)
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / "header.json", header)
            companions(folder)
        dist.barrier()
        todo = _missing(folder, layout)
        mine = todo[ranks.rank() :: ranks.world_size()]
        dist.barrier()
        if ranks.rank() == 0:
            left, size = sum(len(layout.parts[number]) for number in todo), layout.dtype.itemsize
            minutes = left * _seconds_a_record(answer, layout) / ranks.world_size() / 60
            say(
                f"{folder}: {layout.num_records} records of {size} bytes, {shown_bytes(layout.num_records * size)}; "
                f"{left} to compute on {ranks.world_size()} rank(s), about {minutes:.1f} min"
            )
        with tqdm(total=len(mine), unit="part", disable=ranks.rank() != 0 or not sys.stderr.isatty()) as bar:
            for number in mine:
                began = time.perf_counter()
                file = _part(folder, number)
                hidden = file.with_name(f".{file.name}.tmp")
                with hidden.open("wb") as stream:
                    stream.write(answer(layout.parts[number]).tobytes())  # unlike tofile, says why it fails
                    stream.flush()
                    os.fsync(stream.fileno())
                hidden.replace(file)
                _write_json(_side(folder, number), [file_digest(file), time.perf_counter() - began])
                bar.update()
        dist.barrier()
        if ranks.rank() == 0:
            _complete(folder, layout, scored)


def _missing(folder: Path, layout: Layout) -> list[int]:
    """Numbers of the parts that are not whole."""
    sizes = (len(records) * layout.dtype.itemsize for records in layout.parts)
    return [number for number, size in enumerate(sizes) if not _is_whole(folder, number, size)]


def _is_whole(folder: Path, number: int, size: int) -> bool:
    try:
        _digest, _seconds = json.loads(_side(folder, number).read_text())
        return _part(folder, number).stat().st_size == size
    except (OSError, TypeError, ValueError, RecursionError):
        return False


def _require_room(folder: Path, layout: Layout) -> None:
    needed = sum(len(layout.parts[number]) for number in _missing(folder, layout)) * layout.dtype.itemsize
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if needed > free:
        raise ValueError(f"--out {folder} needs {shown_bytes(needed)} more and has {shown_bytes(free)}; make room")


def _complete(folder: Path, layout: Layout, scored: dict[str, float]) -> None:
    sides = [_side(folder, number) for number in range(len(layout.parts))]
    sums, seconds = zip(*(json.loads(side.read_text()) for side in sides), strict=True)
    _write_json(folder / "build.json", sealed({"seconds": sum(seconds)}))
    others = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith((".", "part-", "build."))
    ]
    digests = dict(zip((_part(folder, number).name for number in range(len(sides))), sums, strict=True))
    digests |= {file.name: file_digest(file) for file in others}
    _write_json(folder / "manifest.json", sealed({"score": scored, "sha256": digests}))
    for side in sides:
        side.unlink()
    say(f"{folder} is complete: --teachers {PREFIX}{folder}")


def _require_ours(folder: Path, header: dict[str, Any]) -> None:
    """Makes sure that `folder` is free for a cache, or that the one there is the same and not complete."""
    if (folder / "manifest.json").exists():
        raise ValueError(
            f"--out {folder} is a complete cache; use it by --teachers {PREFIX}{folder}, or choose another"
        )
    if not (folder / "header.json").exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out {folder} exists and is neither an empty folder nor a cache; choose another folder")
        return
    there = read_json(folder / "header.json", remedy=REMEDY)
    for name in header:
        # A teacher may go by another name: the weights say whether it is the same.
        if name != "teacher" and there.get(name) != header[name]:
            raise ValueError(
                f"--out {folder} has begun with another {name}, {there.get(name)!r}, now {header[name]!r}; "
                "repeat its flags to continue it, or choose another folder"
            )


def _seconds_a_record(answer: Callable[[range], np.ndarray], layout: Layout) -> float:
    some = range(min(layout.batch_records, layout.num_records))
    answer(some)
    began = time.perf_counter()
    answer(some)
    return (time.perf_counter() - began) / len(some)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.bin"


def _side(folder: Path, number: int) -> Path:
    return _part(folder, number).with_suffix(".json")


def _write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=1) + "\n")


# --- reading ----------------------------------------------------------------------------------------------------------


def read_header(folder: Path) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError: no cache there.
        ValueError: the cache is not complete, or of another format.
    """
    if not (folder / "header.json").exists():
        raise FileNotFoundError(
            f"--teachers {PREFIX}{folder}: no cache there; make one by python -m kd_core.cache build"
        )
    if not (folder / "manifest.json").exists():
        raise ValueError(f"--teachers {PREFIX}{folder} is not complete; repeat its build, which continues it")
    header = read_json(folder / "header.json", remedy=REMEDY)
    if header.get("format") != FORMAT:
        raise ValueError(f"--teachers {PREFIX}{folder} has format {header.get('format')}, not {FORMAT}; build it anew")
    return header


def read_manifest(folder: Path) -> dict[str, Any]:
    """Its `score` and `sha256` of each file."""
    return read_json(folder / "manifest.json", remedy=REMEDY, score=dict, sha256=dict)


def require(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a cache whose settings are `expected` and whose every byte is as it was written.

    Raises:
        FileNotFoundError, ValueError: as `read_header`; another setting, named with both values; a damaged file.
    """
    header = read_header(folder)
    for name, value in expected.items():
        if header.get(name) != value:
            raise ValueError(
                f"--teachers {PREFIX}{folder} has {name} {header.get(name)!r}, the run {value!r}; "
                "choose the run's flags as those of the cache, or build another"
            )
    if ranks.local_rank() == 0:
        sums = read_manifest(folder)["sha256"]
        for name in ("header.json", *sums):  # it says what else there must be
            if not (folder / name).is_file() or file_digest(folder / name) != sums.get(name):
                raise DamagedError(folder / name, "its bytes are not those that were written", REMEDY)
        parts = {_part(folder, number).name for number in range(len(Layout(**header["layout"]).parts))}
        if parts - sums.keys():
            raise DamagedError(folder / "manifest.json", "it lacks parts", REMEDY)
    return header


class Records:
    """The records of a complete cache, memory-mapped."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        files = [_part(folder, number) for number in range(len(layout.parts))]
        for file, indices in zip(files, layout.parts, strict=True):  # a digest that fits says nothing of it
            if file.stat().st_size != len(indices) * layout.dtype.itemsize:
                raise DamagedError(file, f"it does not hold {len(indices)} records", REMEDY)
        self._parts = [np.memmap(file, layout.dtype, mode="r") for file in files]

    def take(self, samples_B: np.ndarray, patterns_B: np.ndarray) -> np.ndarray:
        """Records [B] of samples and patterns, int64 each."""
        part_B, offset_B = np.divmod(patterns_B * self.layout.num_samples + samples_B, self.layout.part_records)
        records_B = np.empty(len(samples_B), self.layout.dtype)
        for part in np.unique(part_B):
            here = part_B == part
            records_B[here] = self._parts[part][offset_B[here]]
        return records_B
