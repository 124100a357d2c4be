"""Time softmax_kl against the same losses composed from PyTorch functions, forward and backward, on a CPU.

    python -m kd_core.kernels.bench [--threads 1 2] [--rounds 7] [--out FILE]

Runs tests/kernels first, where that folder lies beside the package, and prints nothing else if they fail. Both sides
alternate in one process, so that a machine whose speed drifts slows both. --out appends one JSON line a case.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kd_core.kernels.softmax_kl import softmax_kl, softmax_kl_reference

Loss = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# Rows, columns, dtype, temperature: a masked-LM batch at BERT's vocabulary, and a smaller one.
CASES = (
    (512, 30522, "float32", 1.0),
    (512, 30522, "float32", 2.0),
    (512, 30522, "bfloat16", 2.0),
    (600, 8192, "float32", 1.0),
    (600, 8192, "float32", 2.0),
    (600, 8192, "bfloat16", 2.0),
)


def eager(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What one writes without a kernel; in float32, as bfloat16 logits are not precise enough to take a softmax of."""
    student, teacher = student.float(), teacher.float()
    log_q, log_p = torch.log_softmax(student / temperature, dim=1), torch.log_softmax(teacher / temperature, dim=1)
    kd = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=1) * temperature**2
    return kd, F.cross_entropy(student, labels, reduction="none")


def make_inputs(num_rows: int, num_columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits in place, so that peak memory is not that of making them; the teacher agrees with the student in part."""
    torch.manual_seed(0)
    student, teacher = (torch.empty(num_rows, num_columns, dtype=dtype).normal_(std=2.0) for _ in range(2))
    teacher.add_(student)
    return student.requires_grad_(), teacher, torch.randint(num_columns, (num_rows,))


def step(loss: Loss, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float) -> None:
    """Forward and backward; leaves the gradient in student.grad."""
    student.grad = None
    kd, label = loss(student, teacher, labels, temperature=temperature)
    (0.5 * kd.sum() + 0.5 * label.sum()).backward()


def interleaved_ms(first: Callable[[], None], second: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of both in each round, after one round that warms up."""
    times = []
    for _ in range(rounds + 1):
        marks = [time.perf_counter()]
        for function in (first, second):
            function()
            marks.append(time.perf_counter())
        times.append(((marks[1] - marks[0]) * 1e3, (marks[2] - marks[1]) * 1e3))
    return times[1:]


def _peak_bytes(loss: Loss, num_rows: int, num_columns: int, dtype: torch.dtype, temperature: float) -> int:
    """In a process of its own: growth of its peak resident memory over one step, without the gradient."""
    high_water = lambda: next(
        int(line.split()[1]) << 10
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    step(loss, *make_inputs(2, 100, dtype), temperature)
    inputs = make_inputs(num_rows, num_columns, dtype)
    before = high_water()
    step(loss, *inputs, temperature)
    return high_water() - before - inputs[0].nbytes


def peak_bytes(loss: Loss, num_rows: int, num_columns: int, dtype: torch.dtype, temperature: float) -> int:
    """Peak memory of one step beyond inputs and gradient, as the operating system counts it (Linux)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (loss, num_rows, num_columns, dtype, temperature))


def relative_error(loss: Loss, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, tau: float) -> float:
    """Of the gradient of 16 rows, in the 2-norm, against float64."""
    gradients = []
    for function, dtype in ((softmax_kl_reference, torch.float64), (loss, student.dtype)):
        rows = student[:16].detach().to(dtype).requires_grad_()
        step(function, rows, teacher[:16], labels[:16], tau)
        assert rows.grad is not None, "a step leaves a gradient"
        gradients.append(rows.grad.double())
    return ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()


def measure(num_rows: int, num_columns: int, dtype_name: str, tau: float, threads: int, rounds: int) -> dict[str, Any]:
    """One case: the record of a JSON line."""
    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype_name)
    inputs = make_inputs(num_rows, num_columns, dtype)
    times = interleaved_ms(lambda: step(eager, *inputs, tau), lambda: step(softmax_kl, *inputs, tau), rounds)
    ratios = [eager_ms / ours_ms for eager_ms, ours_ms in times]
    return {
        "shape": [num_rows, num_columns],
        "dtype": dtype_name,
        "temperature": tau,
        "threads": threads,
        "rounds": rounds,
        "eager_ms": statistics.median(eager_ms for eager_ms, _ in times),
        "ours_ms": statistics.median(ours_ms for _, ours_ms in times),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "eager_peak_bytes": peak_bytes(eager, num_rows, num_columns, dtype, tau),
        "ours_peak_bytes": peak_bytes(softmax_kl, num_rows, num_columns, dtype, tau),
        "eager_error": relative_error(eager, *inputs, tau),
        "ours_error": relative_error(softmax_kl, *inputs, tau),
    }


def environment() -> dict[str, str]:
    """Device, versions and commit, the same for all cases."""
    root = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="threads of PyTorch, one table row each")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds a case")
    parser.add_argument("--out", type=Path, help="file to append one JSON line a case to")
    args = parser.parse_args()

    tests = Path(__file__).parents[2] / "tests" / "kernels"
    if tests.is_dir():
        run = subprocess.run([sys.executable, "-m", "pytest", "-q", tests], capture_output=True, text=True, check=False)
        if run.returncode != 0:
            sys.exit(f"{tests} fails, so nothing is timed:\n{run.stdout}{run.stderr}")

    where = environment()
    print(" ".join(f"{name} {value}" for name, value in where.items()))
    print(
        "| shape | dtype | tau | threads | eager ms | ours ms | eager / ours | peak MiB eager, ours | error eager, ours |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for threads in args.threads:
        for case in CASES:
            r = measure(*case, threads, args.rounds)
            print(
                "| {0[0]} x {0[1]} | {dtype} | {temperature} | {threads} | {eager_ms:.1f} | {ours_ms:.1f} "
                "| {ratio:.2f} ({ratio_min:.2f}-{ratio_max:.2f}) | {1:.1f}, {2:.1f} "
                "| {eager_error:.1e}, {ours_error:.1e} |".format(
                    r["shape"], r["eager_peak_bytes"] / 2**20, r["ours_peak_bytes"] / 2**20, **r
                ),
                flush=True,
            )
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(r | where) + "\n")


if __name__ == "__main__":
    main()
