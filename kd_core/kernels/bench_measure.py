"""What bench.py times, and how: the providers of one loss, clocks, memory, launches. Liger-Kernel where it is installed.

The loss, of the same value and gradient for all, is sum over rows of KD_WEIGHT * tau^2 * KL + LABEL_WEIGHT * cross-entropy,
with js in the place of the KL where a case has a beta, and mixed logits in the place of the teacher's where it has a mix.
"""

import ctypes
import functools
import importlib.util
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType

from kd_core.kernels import softmax_kl_native, softmax_kl_triton
from kd_core.kernels.softmax_kl import softmax_kl, softmax_kl_sum
from kd_core.kernels.softmax_kl_reference import js_scale, softmax_kl_reference

KD_WEIGHT, LABEL_WEIGHT = 0.5, 0.5

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU
COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
SAMPLED_ROWS = 64  # whose gradient is compared; the value is that of all rows


class Case(NamedTuple):
    """One line of the table; threads is PyTorch's number on a CPU, 0 on a GPU."""

    rows: int
    columns: int
    dtype: str
    temperature: float
    labels: bool
    threads: int
    beta: float | None = None
    mix: float | None = None

    @property
    def method(self) -> dict[str, Any]:
        """What the functions are called with besides."""
        return method_of(self.beta, self.mix)


def method_of(beta: float | None, mix: float | None) -> dict[str, Any]:
    js = {} if beta is None else {"direction": "js", "beta": beta}
    return js if mix is None else js | {"mix": mix}


class Inputs(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    labels: torch.Tensor | None


Loss = Callable[..., torch.Tensor]  # of student's and teacher's logits, labels, tau; and a method
Step = Callable[[Inputs, float, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Function = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)


def make_inputs(case: Case, device: str) -> Inputs:
    """Logits made in place, so that peak memory is not that of making them; the teacher agrees with the student in part."""
    torch.manual_seed(0)
    shape, dtype = (case.rows, case.columns), getattr(torch, case.dtype)
    student, teacher = (torch.empty(shape, dtype=dtype, device=device).normal_(std=2.0) for _ in range(2))
    teacher.add_(student)
    labels = torch.randint(case.columns, (case.rows,), device=device) if case.labels else None
    return Inputs(student.requires_grad_(), teacher, labels)


def upstreams(device: str) -> tuple[torch.Tensor, ...]:
    """Upstream gradients of the loss: what 1 alone saves shows on a GPU."""
    return tuple(torch.full((), upstream, device=device) for upstream in ((1.0, 0.5) if device == "cuda" else (1.0,)))


# ---------------------------------------------------------------------------------------------------------------------
# Providers
# ---------------------------------------------------------------------------------------------------------------------


def _with_label(kd: torch.Tensor, student: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    if labels is None:
        return KD_WEIGHT * kd
    return KD_WEIGHT * kd + LABEL_WEIGHT * F.cross_entropy(student, labels, reduction="sum")


def _log_softmaxes(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.log_softmax(student / tau, dim=1), torch.log_softmax(teacher / tau, dim=1)


def eager(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None,
    tau: float,
    *,
    direction: str = "forward",
    beta: float = 0.5,
    mix: float | None = None,
) -> torch.Tensor:
    """What one writes without a kernel; in float32, as bfloat16 logits are not precise enough to take a softmax of."""
    student, teacher = student.float(), teacher.float()
    if mix is not None:
        teacher = (1 - mix) * student.detach() + mix * teacher
    log_q, log_p = _log_softmaxes(student, teacher, tau)
    kl = functools.partial(F.kl_div, log_target=True, reduction="sum")
    if direction == "js":
        log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        kd = js_scale(beta) * (beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q))
    else:
        kd = kl(log_q, log_p)
    return _with_label(kd * tau**2, student, labels)


def per_row(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, tau: float, **method: Any
) -> torch.Tensor:
    kd_N, label_N = softmax_kl(student, teacher, labels, temperature=tau, **method)
    return KD_WEIGHT * kd_N.sum() if labels is None else KD_WEIGHT * kd_N.sum() + LABEL_WEIGHT * label_N.sum()


def summed(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, tau: float, **method: Any
) -> torch.Tensor:
    weights: Any = {"kd_weight": KD_WEIGHT, "label_weight": LABEL_WEIGHT}
    return softmax_kl_sum(student, teacher, labels, temperature=tau, **weights, **method)[0]


def liger_kl_div(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, tau: float) -> torch.Tensor:
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    student, teacher = student.float(), teacher.float()
    kd = LigerKLDIVLoss(reduction="sum", log_target=True)(*_log_softmaxes(student, teacher, tau))
    return _with_label(kd * tau**2, student, labels)


def liger_jsd(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, tau: float, **method: Any
) -> torch.Tensor:
    from liger_kernel.transformers.jsd import LigerJSD

    student, teacher = student.float(), teacher.float()
    beta, scale = plain_jsd(method)
    kd = LigerJSD(beta=beta)(*_log_softmaxes(student, teacher, tau)) * len(student)  # it is the mean over rows
    return _with_label(kd * scale * tau**2, student, labels)


def plain_jsd(method: dict[str, Any]) -> tuple[float, float]:
    """The beta of those whose js has no scale and is forward KL at 0, and the scale that makes theirs ours."""
    return (method["beta"], js_scale(method["beta"])) if method else (0.0, 1.0)


def forward_backward(loss: Loss) -> Step:
    """The gradient is returned, not accumulated: that copies a gradient that its function keeps a reference to."""

    def step(inputs: Inputs, tau: float, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = loss(*inputs, tau)
        (grad_NV,) = torch.autograd.grad(value, inputs.student, upstream)
        return value.detach(), grad_NV

    return step


def _replaced(step: Step, module: Any, name: str, replacement: Callable[..., Any]) -> Step:
    """The step with another choice made inside the kernels."""

    def variant(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        original = getattr(module, name)
        setattr(module, name, replacement)
        try:
            return step(*args)
        finally:
            setattr(module, name, original)

    return variant


def without_compiler(step: Step) -> Step:
    return _replaced(step, softmax_kl_native, "supports", lambda *_: False)


def providers(device: str, columns: int, method: dict[str, Any]) -> dict[str, Step]:
    """What is timed on this device, eager PyTorch first."""
    # A static shape each, so that nothing is recompiled for dynamic ones; more than a few need a reset in between.
    torch._dynamo.reset()
    losses: dict[str, Loss] = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False, fullgraph=True)}
    if device == "cuda" and importlib.util.find_spec("liger_kernel") and "mix" not in method:
        losses |= {"Liger JSD": liger_jsd} if method else {"Liger KLDiv": liger_kl_div, "Liger JSD": liger_jsd}
    step = lambda loss: forward_backward(functools.partial(loss, **method))
    found = {name: step(loss) for name, loss in losses.items()}
    rows, total = step(per_row), step(summed)
    found |= {"softmax_kl": rows, "softmax_kl_sum": total}
    if device == "cpu":
        return found | {"softmax_kl, no C compiler": without_compiler(rows)}
    if columns <= softmax_kl_triton.MAX_RESIDENT:
        streaming = softmax_kl_triton.STREAMING
        found["softmax_kl_sum, streaming"] = _replaced(total, softmax_kl_triton, "plan", lambda *_, **__: streaming)
    elif torch.cuda.get_device_capability() >= (9, 0) and softmax_kl_triton.clusters_compile():
        cluster = softmax_kl_triton.cluster_plan
        found["softmax_kl_sum, cluster"] = _replaced(total, softmax_kl_triton, "plan", lambda V, **_: cluster(V))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Truth
# ---------------------------------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    value: float
    rows: torch.Tensor  # indices of the sampled rows, first and last among them
    grad_RV: torch.Tensor


def truth(inputs: Inputs, tau: float, method: dict[str, Any]) -> Truth:
    """Value of all rows, and the gradient of some of them, in float64."""

    def rows_loss(rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        student = inputs.student.detach()[rows].double().requires_grad_()
        labels = None if inputs.labels is None else inputs.labels[rows]
        kd_N, label_N = softmax_kl_reference(student, inputs.teacher[rows], labels, temperature=tau, **method)
        return student, KD_WEIGHT * kd_N.sum() + LABEL_WEIGHT * label_N.sum()

    num_rows, columns = inputs.student.shape
    size = max(1, (1 << 26 if inputs.student.is_cuda else 1 << 21) // columns)
    with torch.no_grad():
        value = math.fsum(rows_loss(slice(start, start + size))[1].item() for start in range(0, num_rows, size))
    sample = torch.linspace(0, num_rows - 1, min(num_rows, SAMPLED_ROWS), dtype=torch.float64).round().long()
    student, loss = rows_loss(sample.to(inputs.student.device))
    return Truth(value, sample.to(inputs.student.device), torch.autograd.grad(loss, student)[0])


def errors(true: Truth, value: torch.Tensor, grad_NV: torch.Tensor) -> dict[str, float]:
    """Relative errors; the gradient's in the 2-norm, for an upstream gradient of 1."""
    difference = grad_NV[true.rows].double() - true.grad_RV
    return {
        "value_error": abs(value.item() - true.value) / abs(true.value),
        "gradient_error": (difference.norm() / true.grad_RV.norm()).item(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Clocks: milliseconds of each function in each round. Functions take turns, so that a machine whose speed drifts slows all
# ---------------------------------------------------------------------------------------------------------------------


def cpu_times(functions: Mapping[Key, Function], rounds: int) -> dict[Key, list[float]]:
    """Of one thread in time of its processor, which is not that of others on the machine; of more in elapsed time."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def elapsed(function: Function) -> float:
        start = clock()
        function()
        return (clock() - start) * 1e3

    turns = [{name: elapsed(function) for name, function in functions.items()} for _ in range(rounds + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in functions}  # the first warms up


def cuda_times(functions: Mapping[Key, Function], rounds: int) -> dict[Key, list[float]]:
    """From one event to another, nothing of the inputs left in the L2."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def elapsed(function: Function) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # and while it does, the host can go ahead with the launches
        start.record()
        function()
        end.record()
        return start, end

    turns = []
    for _ in range(rounds + 1):
        events = {name: elapsed(function) for name, function in functions.items()}
        torch.cuda.synchronize()
        turns.append({name: start.elapsed_time(end) for name, (start, end) in events.items()})
    return {name: [turn[name] for turn in turns[1:]] for name in functions}


def times(functions: Mapping[Key, Function], rounds: int, device: str) -> dict[Key, list[float]]:
    return (cuda_times if device == "cuda" else cpu_times)(functions, rounds)


def copy_function(device: str) -> tuple[Function, int]:
    """A copy, and how many bytes it reads and writes."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), source.nbytes + target.nbytes


# ---------------------------------------------------------------------------------------------------------------------
# Peak memory and first calls, where need be in a process of their own
# ---------------------------------------------------------------------------------------------------------------------


def in_a_new_process(function: Callable[..., Any], *args: Any) -> Any:
    context = multiprocessing.get_context("forkserver")  # of a process that has done nothing but this import
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def own_peak_bytes(function: Function) -> int:
    """Peak memory of a second call beyond what this process holds, as the operating system counts it (Linux).

    For a process of its own, to which nothing is left to reuse.
    """
    # What is freed goes back to the operating system at once, so that it counts when it is used again (-3 is
    # M_MMAP_THRESHOLD of glibc).
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    function()
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    function()
    return _resident_bytes("VmHWM") - before


def _cpu_peak_bytes(name: str, case: Case) -> int:
    torch.set_num_threads(case.threads)
    step, inputs = providers("cpu", case.columns, case.method)[name], make_inputs(case, "cpu")
    return own_peak_bytes(lambda: step(inputs, case.temperature, torch.ones(()))) - inputs.student.nbytes


def cpu_peak_bytes(name: str, case: Case) -> int:
    """Peak memory of one step beyond inputs and gradient (Linux)."""
    return max(0, in_a_new_process(_cpu_peak_bytes, name, case))


def cuda_peak_bytes(function: Function) -> int:
    """Peak memory of one step beyond inputs, the gradient included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _first_call_seconds(name: str, case: Case, device: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(dict.fromkeys(("KD_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), folder))
        step, inputs = providers(device, case.columns, case.method)[name], make_inputs(case, device)
        upstream = upstreams(device)[0]
        start = time.perf_counter()
        step(inputs, case.temperature, upstream)[0].item()
        return time.perf_counter() - start


def first_call_seconds(name: str, case: Case, device: str) -> float:
    """Seconds of the first step of a process that finds nothing compiled."""
    return in_a_new_process(_first_call_seconds, name, case, device)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs the host to launch a step on a GPU
# ---------------------------------------------------------------------------------------------------------------------


def launches(function: Function) -> dict[str, int]:
    """How often each kernel, copy and fill of one step runs on the device; empty where the profiler sees none."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        torch.cuda.synchronize()
    counts: dict[str, int] = {}
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts


def host_us(function: Function, calls: int = 100) -> float:
    """Microseconds of the host a call; nothing is waited for meanwhile."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def synchronizes(function: Function) -> bool:
    """Whether the host waits for the device; then no CUDA graph can be captured, and trying may spoil the process."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(function: Function) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The function as a CUDA graph, and what it returns, which each replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
