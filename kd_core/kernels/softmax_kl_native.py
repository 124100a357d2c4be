"""softmax_kl in C for CPUs: the functions of softmax_kl_torch, each row read once a pass.

softmax_kl.c is compiled for the machine at first use and kept in `$KD_CACHE` (default `~/.cache/kd_recipes`), for this user
alone. Where there is no C compiler (`$CC`, cc, gcc, clang) the module says so through `supports` alone.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kd_core.kernels.softmax_kl_torch import Options, Rows

SOURCE, HEADER = (Path(__file__).with_name(name) for name in ("softmax_kl.c", "vectors.h"))
COMPILERS = ("cc", "gcc", "clang")
# The loops are written for contraction to fused multiply-adds; nothing here reads errno or floating-point traps.
FLAGS = "-std=gnu11 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math".split()

# Numbers of softmax_kl.c; its kind 0 has no teacher.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"forward": 1, "reverse": 2, "js": 3}

# A thread is worth waking for this many logits.
ELEMENTS_A_THREAD = 1 << 16

# A thread takes rows of about this many logits at once: two do not write to the same huge page then, unless at its ends.
ELEMENTS_AT_ONCE = 1 << 20

# Gradients from this size on come from the operating system, page by page, which took longer than to compute them.
HUGE_PAGES_FROM_BYTES = 1 << 22


# ---------------------------------------------------------------------------------------------------------------------
# The library
# ---------------------------------------------------------------------------------------------------------------------


class _Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_bytes", ctypes.c_int64), ("dtype", ctypes.c_int64))


class _Vector(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("step", ctypes.c_int64))


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("student", "teacher", "gradient")),
        *((name, _Vector) for name in ("labels", "student_tau", "teacher_tau", "kd_upstream", "label_upstream", "mix")),
        ("beta", ctypes.c_double),
        ("statistics", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "ignore_index", "with_sums", "with_mixture", "kind")),
        *((name, ctypes.c_int64) for name in ("rows_at_once", "next_row")),
    )


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout


def _compile(compiler: list[str]) -> ctypes.CDLL:
    """The compiled library: the one in the cache, or where there is none that can be trusted a new one."""
    # All macros that the compiler predefines: its version and the processor that it compiles for.
    target = _run([*compiler, *FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    parts = (SOURCE.read_text(), HEADER.read_text(), *FLAGS, target)
    name = f"softmax_kl-{_digest(chr(0).join(parts).encode())}"
    home = os.path.expanduser("~/.cache/kd_recipes")
    if home.startswith("~"):  # a user without a home folder, as a container's may be
        home = os.path.join(tempfile.gettempdir(), f"kd_recipes-{os.getuid()}")
    folder = Path(os.environ.get("KD_CACHE") or home) / "kernels"
    for path in sorted(folder.glob(f"{name}-*.so")):
        if found := _load(path):
            return found
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes may do this at once: the last one's file stays, and they are all alike.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        new = Path(scratch, "new.so")
        _run([*compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(new), "-lm"])
        new.chmod(0o700)
        new = new.rename(Path(scratch, f"{name}-{_digest(new.read_bytes())}.so"))
        found = _load(new)
        if found is None:
            raise OSError(f"{new} was changed while it was made")
        with contextlib.suppress(OSError):  # where somebody else's file has that name, and may not be replaced
            new.rename(folder / new.name)
        return found


def _load(path: Path) -> ctypes.CDLL | None:
    """The library at `path`; None unless it is this user's, nobody else can write it, and it has the digest in its name.

    Whoever shares the cache could put code there otherwise, which would run here.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            ours = status.st_uid == os.geteuid() and not status.st_mode & 0o022
            if not ours or _digest(file.read()) != path.stem.rpartition("-")[2]:
                return None
            opened = f"/proc/self/fd/{file.fileno()}"  # what has been looked at, whatever lies at `path` by now
            return ctypes.CDLL(opened if os.path.exists(opened) else str(path))
    except OSError:
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C functions; None where there is no compiler, and with a warning where what there is fails."""
    named = shlex.split(os.environ.get("CC", ""))
    compiler = named or next(([name] for name in COMPILERS if shutil.which(name)), [])
    if not compiler:
        return None
    try:
        return _compile(compiler)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: no home
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"softmax_kl runs in PyTorch, slower: {SOURCE.name} cannot be compiled by {compiler[0]}: {lines[-1]}",
            stacklevel=2,
        )
        return None


def supports(student_NV: torch.Tensor, teacher_NV: torch.Tensor | None) -> bool:
    """Whether the functions below take these logits: on a CPU, at most 32 bits each, columns side by side."""
    return all(_is_readable(logits_NV) for logits_NV in (student_NV, teacher_NV) if logits_NV is not None) and (
        library() is not None
    )


def _is_readable(logits_NV: torch.Tensor) -> bool:
    adjacent = logits_NV.stride(1) == 1 or logits_NV.shape[1] == 1
    return logits_NV.device.type == "cpu" and logits_NV.dtype in DTYPES and adjacent


# ---------------------------------------------------------------------------------------------------------------------
# The functions of softmax_kl_torch
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Of this process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="softmax_kl")


def _matrix(tensor_NV: torch.Tensor | None) -> _Matrix:
    if tensor_NV is None:
        return _Matrix()
    return _Matrix(tensor_NV.data_ptr(), tensor_NV.stride(0) * tensor_NV.element_size(), DTYPES[tensor_NV.dtype])


def _vector(tensor_N: torch.Tensor | None) -> _Vector:
    return _Vector() if tensor_N is None else _Vector(tensor_N.data_ptr(), tensor_N.stride(0))


def _work(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    options: Options,
    statistics_8N: torch.Tensor,
    *,
    with_sums: bool = False,
    with_mixture: bool = False,
    upstream: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
) -> None:
    """Fills in `statistics_8N`, or `out` from it, or both one row after the other."""
    native = library()
    assert native is not None, "called without asking `supports`"
    num_rows, columns = student_NV.shape
    taus = [
        torch.as_tensor(tau, dtype=torch.float64).expand(num_rows) for tau in (options.student_tau, options.teacher_tau)
    ]
    weights = [None, None] if upstream is None else [weight_N.float().expand(num_rows) for weight_N in upstream]
    mix_N = None if options.mix is None else torch.as_tensor(options.mix, dtype=torch.float32).expand(num_rows)
    js = options.direction == "js" and teacher_NV is not None
    threads = min(torch.get_num_threads(), 1 + num_rows * columns // ELEMENTS_A_THREAD)
    rows_at_once = max(1, min(ELEMENTS_AT_ONCE // columns, num_rows // (4 * threads)))
    call = _Call(
        *(_matrix(tensor) for tensor in (student_NV, teacher_NV, out)),
        *(_vector(tensor) for tensor in (labels_N, *taus, *weights, mix_N)),
        options.beta,
        statistics_8N.data_ptr(),
        *(num_rows, columns, options.ignore_index, with_sums, with_mixture and js),
        0 if teacher_NV is None else KINDS[options.direction],
        *(rows_at_once, 0),
    )
    if out is not None and out.nbytes >= HUGE_PAGES_FROM_BYTES and out.is_contiguous():
        native.softmax_kl_huge_pages(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.nbytes))
    _work_in(threads, native, call)


def _work_in(threads: int, native: ctypes.CDLL, call: _Call) -> None:
    """Each thread takes rows until none is left, so a helper that comes too late has nothing to do."""
    pool = _pool(os.getpid(), torch.get_num_threads()) if threads > 1 else None
    helpers = [pool.submit(native.softmax_kl, ctypes.byref(call)) for _ in range(threads - 1)] if pool else []
    try:
        native.softmax_kl(ctypes.byref(call))
    finally:  # also where a signal's handler raises: helpers use memory that the caller would free
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _new_statistics(student_NV: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(Rows._fields), student_NV.shape[0])


def statistics(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    options: Options,
    *,
    of_part: bool = False,
) -> Rows:
    """The first read of the logits, whose columns are all taken: maxima, sums and mean differences."""
    given, statistics_8N = (student_NV, teacher_NV, labels_N, options), _new_statistics(student_NV)
    _work(*given, statistics_8N, with_sums=True, with_mixture=not of_part)
    return Rows(*statistics_8N.unbind())


def mixture(student_NV: torch.Tensor, teacher_NV: torch.Tensor, stats: Rows, options: Options) -> None:
    """Fills in what js has of the mixture."""
    statistics_8N = torch.stack(stats)
    _work(student_NV, teacher_NV, None, options, statistics_8N, with_mixture=True)
    for row_N, filled_N in zip(stats, statistics_8N, strict=True):
        row_N.copy_(filled_N)


def gradient(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    stats: Rows,
    options: Options,
    kd_upstream_N: torch.Tensor,
    label_upstream_N: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The second read of the logits; fills `out`. Upstream gradients enter before the rounding to its dtype."""
    upstream = kd_upstream_N, label_upstream_N
    _work(student_NV, teacher_NV, labels_N, options, torch.stack(stats), upstream=upstream, out=out)


def statistics_and_gradient(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    options: Options,
    kd_upstream_N: torch.Tensor,
    label_upstream_N: torch.Tensor,
    out: torch.Tensor,
) -> Rows:
    """Both, for one row after the other: the second read finds the row in the cache."""
    given, statistics_8N = (student_NV, teacher_NV, labels_N, options), _new_statistics(student_NV)
    upstream = kd_upstream_N, label_upstream_N
    _work(*given, statistics_8N, with_sums=True, with_mixture=True, upstream=upstream, out=out)
    return Rows(*statistics_8N.unbind())
