"""What a run with teachers will cost on many GPUs, and by how much distillation must shorten it to break even.

    python -m kd_core.plan --measured runs/bert_kd/1 --global-batch-size 4096 --steps 70000 --dollars-per-gpu-hour 2
    python -m kd_core.plan --student-step-ms 820 --teacher-forward-ms 310 --measured-batch-size 512 --parameters 110e6 ...

Model, with b the samples of a GPU and step divided by those of a GPU when measured, S and T the measured milliseconds
of the student's step and of one teacher's forwards, n GPUs:

    student        b * (S - communication exposed on the measured GPUs)
    teacher        b * mean(T) where one teacher is drawn a step, b * sum(T) where all answer
    communication  (1 - overlap) * all-reduce of the gradients, once a step; the teachers communicate nothing
    step           outside the window: t = student + communication; inside: t + teacher
    run            steps * (t + f * teacher), f the window's share of the steps
    break-even     distillation must need at most t / (t + f * teacher) of the steps

An all-reduce of M bytes over a ring of n sends 2 (n - 1) / n * M bytes through each link, in 2 (n - 1) hops. Several
nodes of g GPUs: reduce-scatter within the node, a ring over the nodes for each g-th of the bytes, all-gather within the
node. ZeRO 1 sends as much (reduce-scatter and all-gather); ZeRO 2 and 3 send more, and are not modelled.

Assumed, and to be measured where it matters: time is proportional to samples (rows with less than the measured
micro-batch on a GPU are marked *), the optimizer's step shrinks as the rest, links are not shared, data is ready,
evaluation and checkpoints are not counted, nor is the training of the teachers.

Source: the step's cost 1 + f r / 3 (r the teacher's forward in forwards of the student, whose step is 3) is the special
case without communication. Ring: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations". Pool modes and window: arXiv 2211.00683.
"""

import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kd_core import cli
from kd_core.runs import folders
from kd_core.system import files
from kd_core.system.checked import DamagedError
from kd_core.teachers.samplers import Sampler
from kd_core.teachers.window import first_step
from kd_core.time_to_quality.comparison import METHOD, OF_A_RUN, OPTIMIZER
from kd_core.training.processes import end_process

# What may differ between runs whose step times describe one step: it costs no time, or time in the teacher alone.
FREE = OF_A_RUN | METHOD | (OPTIMIZER - {"dropout"})
OF_TEACHERS = {"teachers", "teacher_dtype"}
NEEDED = ("micro_batch_size", "global_batch_size", "steps", "kd_ratio", "kd_start", "kd_stop", "sampler", "teachers")
LOGGED = ("step", "train_s", "teacher_s", "teacher")
# An interval of the log in which the student takes this many times its median is a stall, not a step's cost.
STALL = 2


@dataclass(frozen=True)
class Plan(cli.Flags):
    """Step times measured on few GPUs, and the run planned on many. Milliseconds are per optimizer step."""

    measured: tuple[str, ...] = ()
    """Run folders (with and without teacher) that give the defaults of all flags down to --draws."""
    student_step_ms: float = 0.0
    """A step without teacher: forward, backward, update, of --measured-batch-size samples on --measured-gpus."""
    teacher_forward_ms: tuple[float, ...] = ()
    """Forwards of that step for each teacher of the pool; none: a run without distillation."""
    measured_gpus: int = 1
    """GPUs on which the times were measured."""
    measured_batch_size: int = 0
    """Samples of the measured step, over all its GPUs."""
    micro_batch_size: int = 1
    """Samples of one forward when measured."""
    parameters: float = 0.0
    """Parameters of the student."""
    steps: int = 0
    """Length of the planned run in optimizer steps, with and without teacher."""
    global_batch_size: int = 0
    """Samples of a step of the planned run, over all GPUs; default: as measured."""
    kd_start: float = 0.0
    """Start of the window, as a fraction of --steps."""
    kd_stop: float = 1.0
    """End of the window, as a fraction of --steps."""
    kd_every: int = 1
    """Inside the window, every so many-th step distils."""
    sampler: Sampler = "uniform"
    """all: every teacher's forward a step; else that of --draws teachers."""
    draws: int = 1
    """Teachers a step."""
    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of GPUs to plan for."""
    gpus_per_node: int = 8
    """GPUs that the fast links connect."""
    bytes_per_gradient: int = 2
    """2 for bf16, 4 for fp32."""
    intra_node_gb_per_s: float = 240.0
    """10^9 bytes a second, per GPU and direction, within a node; default 80 % of an A100's NVLink, 300."""
    inter_node_gb_per_s: float = 20.0
    """The same between nodes; default 80 % of one 200 Gbit/s adapter a GPU, 25."""
    latency_us: float = 10.0
    """Microseconds of one hop of a ring."""
    overlap: float = 0.0
    """Share of the communication that is hidden behind the backward pass; 0 is the upper bound of the cost."""
    dollars_per_gpu_hour: float | None = None
    """Adds a column with the price."""
    json: str | None = None
    """Also writes the table, with its inputs, to this file."""


def check(plan: Plan) -> None:
    """Raises ValueError naming the flag, what is allowed and what was given."""

    def fills_nodes(gpus: int) -> bool:
        return gpus >= 1 and (gpus <= plan.gpus_per_node or gpus % max(1, plan.gpus_per_node) == 0)

    def within(value: float, low: float = 0.0) -> bool:
        return low <= value < math.inf

    whole = f"each at least 1 and, above --gpus-per-node {plan.gpus_per_node}, a multiple of it"
    checks = {
        "gpus_per_node": (plan.gpus_per_node >= 1, "at least 1"),
        "student_step_ms": (0 < plan.student_step_ms < math.inf, "a finite number above 0; or name --measured runs"),
        "teacher_forward_ms": (all(map(within, plan.teacher_forward_ms)), "finite numbers, at least 0"),
        "measured_gpus": (fills_nodes(plan.measured_gpus), whole.removeprefix("each ")),
        "measured_batch_size": (plan.measured_batch_size >= 1, "at least 1; or name --measured runs"),
        "micro_batch_size": (plan.micro_batch_size >= 1, "at least 1"),
        "global_batch_size": (plan.global_batch_size >= 1, "at least 1"),
        "steps": (plan.steps >= 1, "at least 1"),
        "kd_stop": (0 <= plan.kd_start <= plan.kd_stop <= 1, f"in [--kd-start, 1] = [{plan.kd_start}, 1]"),
        "kd_every": (plan.kd_every >= 1, "at least 1"),
        "draws": (plan.draws >= 1, "at least 1"),
        "gpus": (bool(plan.gpus) and all(map(fills_nodes, plan.gpus)), f"one or more numbers, {whole}"),
        "parameters": (
            within(plan.parameters, 0 if max(plan.gpus, default=0) == 1 else 1),
            "at least 1 for more than one GPU",
        ),
        "bytes_per_gradient": (plan.bytes_per_gradient >= 1, "at least 1"),
        "intra_node_gb_per_s": (0 < plan.intra_node_gb_per_s < math.inf, "a finite number above 0"),
        "inter_node_gb_per_s": (0 < plan.inter_node_gb_per_s < math.inf, "a finite number above 0"),
        "latency_us": (within(plan.latency_us), "a finite number, at least 0"),
        "dollars_per_gpu_hour": (within(plan.dollars_per_gpu_hour or 0.0), "a finite number, at least 0"),
        "overlap": (0 <= plan.overlap <= 1, "in [0, 1]"),
    }
    for name, (ok, allowed) in checks.items():
        if not ok:
            raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {getattr(plan, name)}")
    for gpus in plan.gpus:
        if plan.global_batch_size % gpus:
            raise ValueError(
                f"--global-batch-size {plan.global_batch_size} must be a multiple of --gpus {gpus}; "
                "give another batch or other --gpus"
            )


def all_reduce_ms(num_bytes: float, gpus: int, plan: Plan) -> float:
    """Milliseconds of an all-reduce of `num_bytes` over `gpus`, ring within nodes and ring across them."""
    inside = min(gpus, plan.gpus_per_node)
    nodes = gpus // inside
    link_bytes_inside = 2 * (inside - 1) / inside * num_bytes
    link_bytes_across = 2 * (nodes - 1) / nodes * num_bytes / inside
    hops = 2 * (inside - 1) + 2 * (nodes - 1)
    seconds = link_bytes_inside / (plan.intra_node_gb_per_s * 1e9) + link_bytes_across / (
        plan.inter_node_gb_per_s * 1e9
    )
    return 1000 * seconds + plan.latency_us / 1000 * hops


def window_share(steps: int, start: float, stop: float, every: int = 1) -> float:
    """Share of the `steps` that distil: every so many-th with start <= step / steps < stop, as `teachers.window.turn`."""
    return math.ceil((first_step(stop, steps) - first_step(start, steps)) / every) / steps


def predict(plan: Plan, gpus: int) -> dict[str, float]:
    """The planned run on `gpus` GPUs, as by the model at the top of this file.

    Raises:
        ValueError: the communication that the model expects on the measured GPUs takes longer than the measured step.
    """

    def exposed_ms(n: int) -> float:
        return (1 - plan.overlap) * all_reduce_ms(plan.parameters * plan.bytes_per_gradient, n, plan)

    computing_ms = plan.student_step_ms - exposed_ms(plan.measured_gpus)
    if computing_ms <= 0:
        raise ValueError(
            f"--student-step-ms {plan.student_step_ms} is less than the communication expected on "
            f"{plan.measured_gpus} GPUs, {exposed_ms(plan.measured_gpus):.3g} ms; correct the bandwidths or --overlap"
        )
    share = plan.global_batch_size / gpus / (plan.measured_batch_size / plan.measured_gpus)
    forwards_ms = plan.teacher_forward_ms or (0.0,)
    teacher_ms = share * (sum(forwards_ms) if plan.sampler == "all" else plan.draws * statistics.fmean(forwards_ms))
    step_ms = share * computing_ms + exposed_ms(gpus)
    kd_step_ms = step_ms + teacher_ms
    mean_ms = step_ms + window_share(plan.steps, plan.kd_start, plan.kd_stop, plan.kd_every) * teacher_ms
    hours, kd_hours = (plan.steps * ms / 3.6e6 for ms in (step_ms, mean_ms))
    return {
        "gpus": gpus,
        "samples_per_gpu": plan.global_batch_size // gpus,
        "student_ms": share * computing_ms,
        "teacher_ms": teacher_ms,
        "communication_ms": exposed_ms(gpus),
        "step_ms": step_ms,
        "kd_step_ms": kd_step_ms,
        "hours": hours,
        "kd_hours": kd_hours,
        "gpu_hours": gpus * hours,
        "kd_gpu_hours": gpus * kd_hours,
        "cost_ratio": mean_ms / step_ms,
        "break_even_steps": step_ms / mean_ms,
    }


def measure(folders: Sequence[Path]) -> dict[str, Any]:
    """Fields of a `Plan` from runs of one kind of step, with a teacher or without: means over the log's intervals.

    The time up to the first line of the log is left out, as it holds what is slow once, and so are stalls.

    Raises:
        FileNotFoundError: no run there.
        ValueError: a run is damaged, the runs' steps are not alike, or their logs have fewer than two lines.
    """
    runs = {folder: _load(folder) for folder in folders}
    _refuse_unlike({folder: fields for folder, (fields, _) in runs.items()}, FREE)
    distilled = {folder: fields for folder, (fields, _) in runs.items() if fields["kd_ratio"]}
    _refuse_unlike(distilled, FREE - OF_TEACHERS)
    # Steps, seconds of the student, seconds of the teachers, their forwards where both ends are within the window.
    intervals = []
    for run, lines in runs.values():
        # Of `per_rank` the log names the draws of all ranks.
        share = 1 / run.get("kd_every", 1) / (run["GPUs"] if run["sampler"] == "per_rank" else 1)
        for before, line in itertools.pairwise(lines):
            steps, train_s, teacher_s = (line[part] - before[part] for part in ("step", "train_s", "teacher_s"))
            forwards = steps * share * len(line["teacher"]) if before["teacher"] else 0
            intervals.append((steps, train_s - teacher_s, teacher_s, forwards))
    if not intervals:
        raise ValueError(f"--measured {folders[0]} has fewer than two lines in its log; choose a smaller --log-every")
    usual_s = statistics.median(student_s / steps for steps, student_s, *_ in intervals)
    calm = [interval for interval in intervals if interval[1] <= STALL * usual_s * interval[0]]
    forwards_s = [(teacher_s, forwards) for *_, teacher_s, forwards in calm if forwards]
    config = next(iter(distilled.values()), runs[folders[0]][0])
    fields = {name: config[name] for name in NEEDED if name not in ("kd_ratio", "teachers")}
    return fields | {
        "student_step_ms": 1000 * sum(interval[1] for interval in calm) / sum(interval[0] for interval in calm),
        "teacher_forward_ms": (1000 * sum(s for s, _ in forwards_s) / sum(n for _, n in forwards_s),)
        * len(config["teachers"])
        if forwards_s
        else (),
        "kd_every": config.get("kd_every", 1),
        "draws": config.get("draws", 1),
        "measured_gpus": config["GPUs"],
        "measured_batch_size": config["global_batch_size"],
        "parameters": next((count for count in map(_parameters, folders) if count), 0.0),
    }


def _refuse_unlike(runs: dict[Path, dict[str, Any]], free: Collection[str]) -> None:
    for folder, run in runs.items():
        first, model = next(iter(runs.items()))
        for name in sorted((run.keys() | model.keys()) - set(free)):
            if run.get(name) != model.get(name):
                raise ValueError(
                    f"--measured {folder} has {name} {run.get(name)}, {first} has {model.get(name)}; "
                    "name runs that differ in the teacher's part of the step at most"
                )


def _load(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's config, with `GPUs` and `hardware` besides, and the lines of its log."""
    try:
        record, logged = folders.read_run(folder)
        folders.check_files(folder, record, "hf")
        fields = record["config"] | {"GPUs": record["world_size"], "hardware": record.get("hardware")}
        lines = [{name: line[name] for name in LOGGED} for line in logged]
        return fields | {name: fields[name] for name in NEEDED}, lines
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--measured {folder} holds no run (no {Path(error.filename).name})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"--measured {folder} is no run of this project, or damaged ({what}); give its times as flags"
        ) from None


def _parameters(folder: Path) -> float:
    """Parameters of a finished run's student, 0 for a run without one."""
    file = folder / "hf" / "model.safetensors"
    if not file.exists():
        return 0.0
    try:
        with safe_open(file, "pt") as weights:
            return float(sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()))  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedError(file, str(error)) from None


def table(plan: Plan, rows: Sequence[dict[str, float]]) -> str:
    """The rows as a markdown table, and below it what they rest on."""

    def short(*values: float) -> str:
        return ", ".join(f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}" for value in values)

    columns: dict[str, Callable[[dict[str, float]], str]] = {
        "GPUs": lambda row: f"{row['gpus']}" + "*" * (row["samples_per_gpu"] < plan.micro_batch_size),
        "student ms": lambda row: short(row["student_ms"]),
        "teacher ms": lambda row: short(row["teacher_ms"]),
        "communication ms": lambda row: short(row["communication_ms"]),
        "hours without, with": lambda row: short(row["hours"], row["kd_hours"]),
        "GPU hours": lambda row: short(row["gpu_hours"], row["kd_gpu_hours"]),
        "breaks even at": lambda row: f"{row['break_even_steps']:.1%} of the steps",
    }
    price = plan.dollars_per_gpu_hour
    if price is not None:
        columns["dollars"] = lambda row: short(price * row["gpu_hours"], price * row["kd_gpu_hours"])
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    share = window_share(plan.steps, plan.kd_start, plan.kd_stop)
    lines += [
        "",
        f"{plan.steps} steps of {plan.global_batch_size} samples, without teachers and with them in {share:.1%}.",
    ]
    lines += [
        "Distillation is faster if it needs fewer steps than that for equal quality; training the teachers is not counted."
    ]
    if any(row["samples_per_gpu"] < plan.micro_batch_size for row in rows):
        lines += [f"* less than the measured micro-batch of {plan.micro_batch_size} on a GPU: may well be slower."]
    return "\n".join(lines)


def main() -> None:
    with cli.one_line_errors():
        words = sys.argv[1:]
        plan = cli.read_flags(Plan, words, Plan())
        if plan.measured:
            plan = cli.read_flags(
                Plan, words, dataclasses.replace(plan, **measure([Path(run) for run in plan.measured]))
            )
        plan = dataclasses.replace(plan, global_batch_size=plan.global_batch_size or plan.measured_batch_size)
        check(plan)
        rows = [predict(plan, gpus) for gpus in plan.gpus]
        print(table(plan, rows))
        if plan.json:
            files.write_atomic(Path(plan.json), json.dumps({"plan": dataclasses.asdict(plan), "rows": rows}, indent=2))


if __name__ == "__main__":
    end_process(main)
