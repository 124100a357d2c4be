"""Time softmax_kl against the same loss composed from PyTorch functions, torch.compile of it, and Liger-Kernel.

    python -m kd_core.kernels.bench --quick

Runs tests/kernels first, where that folder lies beside the package, and prints nothing else if they fail. Then all providers
take turns in one process, forward and backward, case by case (bench_measure.py has them). Of one thread on a CPU milliseconds
are of its processor, so that others on the machine do not count. GB/s count what one read of both logits and one write of the
gradient move, whatever a provider does move, and stand beside the rate of a copy in the same rounds; the basis of two reads is
5 / 3 of it. Into --out go cases.jsonl (a line a case), table.md and speed.png.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from kd_core.kernels import bench_measure, softmax_kl_native
from kd_core.kernels.bench_measure import Case, Function, Inputs, Step, Truth

COLUMNS = (1000, 4096, 30522, 32000, 50257, 128256, 151936)
DTYPES = ("bfloat16", "float32")
TEMPERATURES = (1.0, 2.0, 3.3)
QUICK_COLUMNS, QUICK_TEMPERATURES = (1000, 30522, 128256), (1.0, 2.0)

# A batch of images, of masked tokens, or of a language model's tokens; elsewhere about ELEMENTS logits a side.
ROWS = {
    "cpu": {30522: 512, 128256: 128},
    "cuda": {1000: 1024, 4096: 65536, 30522: 19660, 32000: 8192, 50257: 8192, 128256: 8192, 151936: 8192},
}
ELEMENTS = {"cpu": 16_000_000, "cuda": 250_000_000}
EAGER_BYTES = 64  # an element: what eager PyTorch may need in all, so that a case fits a smaller GPU

LAUNCH_BOUND_COLUMNS = 1000  # up to here, launches and the host's time are counted
ROUNDS = {"cpu": 7, "cuda": 20}
COMPILED = ("torch.compile", "softmax_kl", "softmax_kl_sum", "Liger KLDiv")
# Rounding of the gradient to bfloat16 alone is 1.7e-3.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-3}

HEADER = (
    "| logits | dtype | tau | labels | threads | provider | ms (20-80 %) | at upstream 0.5 | GB/s | of a copy "
    "| of a copy, two reads | x eager (min-max) | MiB beyond inputs and gradient | a row, B | error of value | of gradient |"
)
LAUNCH_HEADER = (
    "| V | dtype | tau | labels | provider | launches (softmax_kl's) | host us | waits | graph us | error in graph |"
)


# ---------------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------------


def spread(times: list[float]) -> dict[str, float]:
    """Median and the 20 and 80 percentiles, milliseconds."""
    low, _, _, high = statistics.quantiles(times, n=5, method="inclusive")
    return {"ms": statistics.median(times), "ms_20": low, "ms_80": high}


def checked(
    steps: dict[str, Step], inputs: Inputs, tau: float, upstream: torch.Tensor, true: Truth
) -> dict[str, dict[str, Any]]:
    """The first call of each provider: its errors, or why it does not run, which is fatal for ours as `plan` has them."""
    results: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        try:
            results[name] = bench_measure.errors(true, *step(inputs, tau, upstream))
        except (RuntimeError, TritonError) as error:
            if name in ("eager", "softmax_kl", "softmax_kl_sum"):
                raise
            reason = str(error).strip() or type(error).__name__
            results[name] = {"failed": reason.splitlines()[0]}
    return results


def launch_costs(functions: dict[str, Function], true: Truth, rounds: int) -> dict[str, dict[str, Any]]:
    """Of a step on a GPU: launches, the host's time, and whether and how fast it replays as a CUDA graph."""
    costs: dict[str, dict[str, Any]] = {
        name: {"launches": bench_measure.launches(function), "synchronizes": bench_measure.synchronizes(function)}
        for name, function in functions.items()
    }
    turns = [{name: bench_measure.host_us(function) for name, function in functions.items()} for _ in range(7)]
    replays = {}
    for name, function in functions.items():
        costs[name]["host_us"] = statistics.median(turn[name] for turn in turns)
        if not costs[name]["synchronizes"]:
            replays[name], (value, grad_NV) = bench_measure.captured(function)
            grad_NV.fill_(float("nan"))
            replays[name].replay()
            costs[name] |= {
                f"graph_{which}": error for which, error in bench_measure.errors(true, value, grad_NV).items()
            }
    times = bench_measure.cuda_times({name: graph.replay for name, graph in replays.items()}, rounds)
    for name in replays:
        costs[name]["graph_us"] = statistics.median(times[name]) * 1e3
    return costs


def speeds(
    functions: dict[tuple[str, int], Function], moved: int, device: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """By provider, from functions keyed by provider and number of the upstream gradient; `moved` bytes a step."""
    copy, copy_bytes = bench_measure.copy_function(device)
    times = bench_measure.times(functions | {("copy", 0): copy}, rounds, device)
    copy_gbps = copy_bytes / statistics.median(times.pop(("copy", 0))) * 1e-6
    results: dict[str, dict[str, Any]] = {"copy": {"gbps": copy_gbps}}
    for (name, turn), own in times.items():
        if turn > 0:
            results[name] |= {f"{figure}_upstream_half": value for figure, value in spread(own).items()}
            continue
        ratios = [theirs / its for theirs, its in zip(times["eager", 0], own, strict=True)]
        gbps = moved / statistics.median(own) * 1e-6
        results[name] = spread(own) | {
            "gbps": gbps,
            "of_copy": gbps / copy_gbps,
            "of_copy_two_reads": gbps / copy_gbps * 5 / 3,
            "speedup": statistics.median(ratios),
            "speedup_min": min(ratios),
            "speedup_max": max(ratios),
        }
    return results


def measure(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """The record of a JSON line."""
    if case.threads:
        torch.set_num_threads(case.threads)
    inputs, tau = bench_measure.make_inputs(case, device), case.temperature
    true, upstreams = bench_measure.truth(inputs, tau, case.method), bench_measure.upstreams(device)
    steps = bench_measure.providers(device, case.columns, case.method)
    results = checked(steps, inputs, tau, upstreams[0], true)
    functions: dict[tuple[str, int], Function] = {
        (name, turn): functools.partial(step, inputs, tau, upstream)
        for turn, upstream in enumerate(upstreams)
        for name, step in steps.items()
        if "failed" not in results[name]
    }
    first = {name: function for (name, turn), function in functions.items() if turn == 0}
    figures = speeds(functions, 3 * inputs.student.nbytes, device, rounds)
    memory = extra_bytes(case, first, device)
    launched = device == "cuda" and case.columns <= LAUNCH_BOUND_COLUMNS
    costs = launch_costs(first, true, rounds) if launched else {}
    for name in first:
        results[name] |= figures[name] | memory.get(name, {}) | costs.get(name, {})
    return case._asdict() | {"rounds": rounds, "copy_gbps": figures["copy"]["gbps"], "providers": results}


def extra_bytes(case: Case, functions: dict[str, Function], device: str) -> dict[str, dict[str, float]]:
    """Peak memory beyond inputs and gradient; on a CPU only Linux tells."""
    if device == "cuda":
        grad_bytes = case.rows * case.columns * getattr(torch, case.dtype).itemsize
        extra = {name: bench_measure.cuda_peak_bytes(function) - grad_bytes for name, function in functions.items()}
    else:
        extra = {name: bench_measure.cpu_peak_bytes(name, case) for name in functions if sys.platform == "linux"}
    return {name: {"extra_bytes": size, "extra_bytes_a_row": size / case.rows} for name, size in extra.items()}


def wrong(record: dict[str, Any]) -> list[str]:
    """Providers whose value or gradient is not the loss's."""
    bound = TOLERANCE[record["dtype"]]
    kinds = "value_error", "gradient_error", "graph_value_error", "graph_gradient_error"
    return [
        name
        for name, result in record["providers"].items()
        if "failed" not in result and not all(result.get(kind, 0.0) <= bound for kind in kinds)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


def table_lines(record: dict[str, Any]) -> Iterator[str]:
    method = "".join(f", {name} {record[name]:g}" for name in ("beta", "mix") if record[name] is not None)
    start = "| {rows} x {columns}{0} | {dtype} | {temperature:g} | ".format(method, **record)
    start += f"{'on' if record['labels'] else 'off'} | {record['threads'] or '-'} | "
    for name, r in record["providers"].items():
        if "failed" in r:
            yield f"{start}{name} | failed: {r['failed'].replace('|', '/')[:120]} |" + " |" * 9
            continue
        half = "{ms_upstream_half:.3f}".format(**r) if "ms_upstream_half" in r else "-"
        memory = (
            "{0:.1f} | {extra_bytes_a_row:.0f}".format(r["extra_bytes"] / 2**20, **r) if "extra_bytes" in r else "- | -"
        )
        mark = " WRONG" if name in wrong(record) else ""
        yield (
            start
            + "{0} | {ms:.3f} ({ms_20:.3f}-{ms_80:.3f}) | {1} | {gbps:.3g} | {of_copy:.0%} | {of_copy_two_reads:.0%} "
            "| {speedup:.2f} ({speedup_min:.2f}-{speedup_max:.2f}) | {2} | {value_error:.0e} | {gradient_error:.0e}{3} |"
        ).format(name, half, memory, mark, **r)


def launch_lines(record: dict[str, Any]) -> Iterator[str]:
    for name, r in record["providers"].items():
        if "launches" not in r:
            continue
        own = sum(count for kernel, count in r["launches"].items() if hasattr(bench_measure.softmax_kl_triton, kernel))
        graph = "{graph_us:.1f} | {graph_gradient_error:.0e}".format(**r) if "graph_us" in r else "- | -"
        yield (
            f"| {record['columns']} | {record['dtype']} | {record['temperature']:g} | {'on' if record['labels'] else 'off'} "
            f"| {name} | {sum(r['launches'].values()) or '-'} ({own}) | {r['host_us']:.1f} "
            f"| {'yes' if r['synchronizes'] else 'no'} | {graph} |"
        )


def plot(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """GB/s over V: a panel for each dtype, number of threads and temperature; dashed without labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = sorted({(r["dtype"], r["threads"]) for r in records})
    taus = sorted({r["temperature"] for r in records})
    names = list(dict.fromkeys(name for r in records for name in r["providers"]))
    figure, axes = pyplot.subplots(
        len(lines),
        len(taus),
        figsize=(1.5 + 4.5 * len(taus), 1 + 3.5 * len(lines)),
        squeeze=False,
        layout="constrained",
    )
    for (line, (dtype, threads)), (column, tau) in itertools.product(enumerate(lines), enumerate(taus)):
        axis = axes[line][column]
        here = [r for r in records if (r["dtype"], r["threads"], r["temperature"]) == (dtype, threads, tau)]
        for labels, (color, name) in itertools.product((True, False), enumerate(names)):
            shown = sorted(
                (r["columns"], r["providers"][name]["gbps"])
                for r in here
                if r["labels"] == labels and "gbps" in r["providers"].get(name, ())
            )
            label = name if labels == max(r["labels"] for r in records) else None
            style = {"linestyle": "-" if labels else "--", "marker": "o", "markersize": 3, "color": f"C{color}"}
            axis.plot([columns for columns, _ in shown], [gbps for _, gbps in shown], label=label, **style)
        copies = sorted({(r["columns"], r["copy_gbps"]) for r in here})
        axis.plot(*zip(*copies, strict=True), color="gray", linestyle=":", label="copy")
        axis.set(xscale="log", ylim=(0, None), xlabel="V", ylabel="GB/s, one read and one write counted")
        axis.set_title(f"{dtype}, tau {tau:g}" + (f", threads {threads}" if threads else ""), fontsize=10)
        axis.grid(alpha=0.3)
    handles, labels_ = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels_, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def environment(device: str) -> dict[str, Any]:
    """Device, versions, commit and date, the same for all cases."""
    root = Path(__file__).parent
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    git = subprocess.run(describe, cwd=root, capture_output=True, text=True, check=False)
    found = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("liger_kernel"):
        found["liger_kernel"] = importlib.metadata.version("liger_kernel")
    if device == "cuda":
        name, found["cuda"] = torch.cuda.get_device_name(), torch.version.cuda or "none"
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
        found["c_compiler"] = "yes" if softmax_kl_native.library() is not None else "no"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"device": name} | found | {"commit": git.stdout.strip() or "unknown", "date": date}


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def run_tests() -> str:
    """The last line of pytest; exits with its output where a test fails."""
    tests = Path(__file__).parents[2] / "tests" / "kernels"
    if not tests.is_dir():
        return "no tests beside the package"
    command = [sys.executable, "-m", "pytest", "-q", str(tests)]
    run = subprocess.run(command, cwd=tests.parents[1], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        sys.exit(f"{tests} fails, so nothing is timed:\n{run.stdout}{run.stderr}")
    return run.stdout.strip().splitlines()[-1]


def rows_of(columns: int, device: str) -> int:
    rows = ROWS[device].get(columns, max(1, ELEMENTS[device] // columns))
    if device == "cuda":
        rows = min(rows, torch.cuda.mem_get_info()[0] // (EAGER_BYTES * columns))
    return rows


def cases(args: argparse.Namespace) -> Iterator[Case]:
    dtypes = (
        args.dtypes or (("bfloat16",) if args.device == "cuda" else ("float32",))
        if args.quick
        else args.dtypes or DTYPES
    )
    grid = itertools.product(
        args.threads if args.device == "cpu" else (0,),
        dtypes,
        args.columns or (QUICK_COLUMNS if args.quick else COLUMNS),
        args.temperatures or (QUICK_TEMPERATURES if args.quick else TEMPERATURES),
        [labels == "on" for labels in args.labels or (("on",) if args.quick else ("on", "off"))],
    )
    for threads, dtype, columns, tau, labels in grid:
        rows = args.rows or rows_of(columns, args.device)
        yield Case(rows, columns, dtype, tau, labels, threads, args.beta, args.mix)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the headline rows: V 1000, 30522, 128256, one dtype, labels on"
    )
    parser.add_argument("--columns", type=int, nargs="+", metavar="V", help=f"default {COLUMNS}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default both")
    parser.add_argument("--temperatures", type=float, nargs="+", metavar="TAU", help=f"default {TEMPERATURES}")
    parser.add_argument("--labels", nargs="+", choices=("on", "off"), help="default both")
    parser.add_argument("--beta", type=float, help="Jensen-Shannon with this beta; default forward KL")
    parser.add_argument("--mix", type=float, help="a target of this share of the teacher's logits")
    parser.add_argument("--rows", type=int, help="rows of every case; default by V and device")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="threads of PyTorch on a CPU, in turn")
    parser.add_argument("--rounds", type=int, help=f"timed rounds a case, at least 2; default {ROUNDS}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is a GPU")
    parser.add_argument("--out", type=Path, help="folder of the results; default runs/bench/kernels-<date>")
    args = parser.parse_args(words)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.rounds = args.rounds or ROUNDS[args.device]
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    args.out = args.out or Path("runs/bench") / f"kernels-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return args


def report_first_calls(chosen: list[Case], device: str) -> dict[str, float]:
    case = chosen[len(chosen) // 2]
    names = [name for name in bench_measure.providers(device, case.columns, case.method) if name in COMPILED]
    return {name: bench_measure.first_call_seconds(name, case._replace(rows=64), device) for name in names}


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    tests = run_tests()
    chosen, where = list(cases(args)), environment(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "table.md"

    def show(lines: Iterable[str]) -> None:
        for line in lines:
            print(line, flush=True)
            with table.open("a") as file:
                file.write(line + "\n")

    first_calls = report_first_calls(chosen, args.device)
    show([f"tests/kernels: {tests}  ", "  \n".join(f"{name}: {value}" for name, value in where.items()) + "  "])
    show(["first call, nothing cached: " + ", ".join(f"{name} {s:.1f} s" for name, s in first_calls.items()), ""])
    show([HEADER, "|---" * HEADER.count(" | ") + "|---|"])
    records = []
    for case in chosen:
        record = where | measure(case, args.device, args.rounds) | {"first_call_s": first_calls}
        records.append(record)
        with (args.out / "cases.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        show(table_lines(record))
    launch_table = [line for record in records for line in launch_lines(record)]
    if launch_table:
        show(["", LAUNCH_HEADER, "|---" * LAUNCH_HEADER.count(" | ") + "|---|", *launch_table])
    if importlib.util.find_spec("matplotlib"):
        plot(records, args.out / "speed.png", f"{where['device']}, torch {where['torch']}, {where['date']}")
    print(f"results in {args.out}")
    if any(name.startswith("softmax_kl") for record in records for name in wrong(record)):
        sys.exit("softmax_kl is not the loss it should be: see WRONG in the table")


if __name__ == "__main__":
    main()
