"""Time linear_softmax_kl against heads and losses composed from PyTorch functions, torch.compile of them, and its peers.

    python -m kd_core.kernels.bench_linear

All providers take turns in one process, from hidden states to the gradients of hidden states and weight, which are compared
with float64. "matmuls alone" are those of linear_softmax_kl, chunk by chunk, and nothing else: what they cost is the least
that it can. Peers are those of Liger-Kernel and TRL, where they are installed (pip install liger-kernel trl). Liger's
FusedLinearJSD and FusedLinearKLDiv and TRL's chunked_divergence have no label term and run with --labels off; FusedLinearKLDiv
is given the teacher's probabilities, whose making is not timed. No peer has a mix; their js has no scale and is given ours.
Into --out goes cases.jsonl, a line a case.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kd_core.kernels import linear_softmax_kl as fused
from kd_core.kernels.bench import ROUNDS, environment, spread
from kd_core.kernels.bench_measure import (
    KD_WEIGHT,
    LABEL_WEIGHT,
    Function,
    cuda_peak_bytes,
    in_a_new_process,
    method_of,
    own_peak_bytes,
    plain_jsd,
    times,
)
from kd_core.kernels.bench_measure import eager as loss_of_logits
from kd_core.kernels.softmax_kl import softmax_kl_reference, softmax_kl_sum

# Student's width, teacher's width, V: BERT-base and -large, Qwen2.5 0.5B and 7B, Llama 3.2 1B and 3.1 8B; small on a CPU.
SHAPES = {"cpu": ("256,512,30522",), "cuda": ("768,1024,30522", "896,3584,151936", "2048,4096,128256")}
TOKENS = {"cpu": (1024, 4096), "cuda": (1024, 4096, 16384)}
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}
# Of the gradients, in the 2-norm. In bfloat16 what is rounded are the gradient of the logits and the result.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
OURS = "linear_softmax_kl"
WEIGHTS: Any = {"kd_weight": KD_WEIGHT, "label_weight": LABEL_WEIGHT}

HEADER = (
    "| tokens x (D, E, V) | dtype | tau | labels | threads | provider | ms (20-80 %) | x eager (min-max) | matmuls alone take of it "
    "| MiB beyond inputs and gradients | error of value | of hidden's gradient | of weight's |"
)


class Case(NamedTuple):
    """One line of the table; threads is PyTorch's number on a CPU, 0 on a GPU."""

    rows: int
    student_width: int
    teacher_width: int
    columns: int
    dtype: str
    temperature: float
    labels: bool
    threads: int
    beta: float | None = None
    mix: float | None = None


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    labels: torch.Tensor | None


Loss = Callable[..., torch.Tensor]  # of inputs and tau; and a method of `method_of`
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # the value before them


def make_inputs(case: Case, device: str) -> Inputs:
    """Logits of a standard deviation of about 2 on both sides."""
    torch.manual_seed(0)
    make = functools.partial(torch.randn, dtype=getattr(torch, case.dtype), device=device)
    sides = [
        (make(case.rows, width), make(case.columns, width).mul_(2 / math.sqrt(width)))
        for width in (case.student_width, case.teacher_width)
    ]
    (hidden, weight), teacher = sides
    labels = torch.randint(case.columns, (case.rows,), device=device) if case.labels else None
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), *teacher, labels)


# ---------------------------------------------------------------------------------------------------------------------
# Providers
# ---------------------------------------------------------------------------------------------------------------------


def logits(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        teacher = inputs.teacher_hidden @ inputs.teacher_weight.t()
    return inputs.hidden @ inputs.weight.t(), teacher


def eager(inputs: Inputs, tau: float, **method: Any) -> torch.Tensor:
    return loss_of_logits(*logits(inputs), inputs.labels, tau, **method)


def unfused(inputs: Inputs, tau: float, **method: Any) -> torch.Tensor:
    options: Any = WEIGHTS | method
    return softmax_kl_sum(*logits(inputs), inputs.labels, temperature=tau, **options)[0]


def ours(inputs: Inputs, tau: float, **method: Any) -> torch.Tensor:
    options: Any = WEIGHTS | method
    return fused.linear_softmax_kl(*inputs, temperature=tau, **options)[0]


def trl_chunked(inputs: Inputs, tau: float, **method: Any) -> torch.Tensor:
    """Of no labels: it has no term for them."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta, scale = plain_jsd(method)
    sides = inputs.hidden, inputs.weight, None, inputs.teacher_hidden, inputs.teacher_weight, None
    divergence_N, _ = ChunkedDivergenceFunction.apply(*sides, beta, tau)
    return KD_WEIGHT * scale * tau**2 * divergence_N.sum()


def liger_chunked_jsd(inputs: Inputs, tau: float, **method: Any) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    rows = len(inputs.hidden)
    hard = 0.0 if inputs.labels is None else LABEL_WEIGHT
    labels = inputs.hidden.new_zeros(rows, dtype=torch.int64) if inputs.labels is None else inputs.labels
    beta, scale = plain_jsd(method)
    loss = LigerFusedLinearJSDLoss(hard, KD_WEIGHT * scale * tau**2, beta=beta, temperature=tau)
    return rows * loss(*inputs[:4], labels)  # it is the mean over rows


def liger_jsd(inputs: Inputs, tau: float, **method: Any) -> torch.Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    beta, scale = plain_jsd(method)
    loss = LigerFusedLinearJSD(jsd_beta=beta, temperature=tau, accum_dtype=torch.float32)
    return KD_WEIGHT * scale * tau**2 * len(inputs.hidden) * loss(*inputs[:4], None)


def liger_kl_div(inputs: Inputs, tau: float) -> Loss:
    """Of inputs that hold the teacher's probabilities."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    with torch.no_grad():
        probabilities = torch.softmax(logits(inputs)[1].float() / tau, dim=1).to(inputs.hidden.dtype)
    loss = LigerFusedLinearKLDivLoss(reduction="sum", temperature=tau, accum_dtype=torch.float32)
    return lambda inputs, tau: KD_WEIGHT * tau**2 * loss(inputs.hidden, inputs.weight, probabilities)


def forward_backward(loss: Loss, inputs: Inputs, tau: float) -> Gradients:
    value = loss(inputs, tau)
    hidden_grad, weight_grad = torch.autograd.grad(value, (inputs.hidden, inputs.weight))
    return value.detach(), hidden_grad, weight_grad


def matmuls_alone(inputs: Inputs, tau: float) -> None:
    """Those of linear_softmax_kl: its loss pass does nothing meanwhile."""
    weighted_sum = fused.softmax_kl.weighted_sum
    zero = inputs.hidden.new_zeros((), dtype=torch.float32)
    fused.softmax_kl.weighted_sum = lambda *_: (zero, zero, zero)
    try:
        forward_backward(ours, inputs, tau)
    finally:
        fused.softmax_kl.weighted_sum = weighted_sum


def providers(case: Case, inputs: Inputs) -> dict[str, Function]:
    """What is timed on these inputs, eager PyTorch first."""
    torch._dynamo.reset()
    losses: dict[str, Loss] = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    losses |= {"matmuls + softmax_kl_sum": unfused, OURS: ours}
    method = method_of(case.beta, case.mix)
    without_labels = not case.labels and case.mix is None
    if importlib.util.find_spec("liger_kernel") and case.mix is None:
        losses["Liger chunked JSD"] = liger_chunked_jsd
        if without_labels and inputs.hidden.is_cuda:
            losses["Liger FusedLinearJSD"] = liger_jsd
            if not method:
                losses["Liger FusedLinearKLDiv"] = liger_kl_div(inputs, case.temperature)
    if importlib.util.find_spec("trl") and without_labels:
        losses["TRL chunked_divergence"] = trl_chunked
    steps = {
        name: functools.partial(forward_backward, functools.partial(loss, **method), inputs, case.temperature)
        for name, loss in losses.items()
    }
    return steps | {"matmuls alone": functools.partial(matmuls_alone, inputs, case.temperature)}


# ---------------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------------


def truth(inputs: Inputs, tau: float, **method: Any) -> Gradients:
    """In float64 with autograd, a few rows at a time."""
    hidden, weight, teacher_hidden, teacher_weight = (tensor.detach().double() for tensor in inputs[:4])
    weight.requires_grad_()
    value, weight_grad, hidden_grads = 0.0, torch.zeros_like(weight), []
    size = max(1, (1 << 27 if hidden.is_cuda else 1 << 22) // len(weight))
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        labels = None if inputs.labels is None else inputs.labels[rows]
        part = Inputs(hidden[rows].requires_grad_(), weight, teacher_hidden[rows], teacher_weight, labels)
        kd_N, label_N = softmax_kl_reference(*logits(part), labels, temperature=tau, **method)
        loss = KD_WEIGHT * kd_N.sum() + LABEL_WEIGHT * label_N.sum()
        hidden_grad, more = torch.autograd.grad(loss, (part.hidden, weight))
        value += loss.item()
        weight_grad += more
        hidden_grads.append(hidden_grad)
    return torch.tensor(value, dtype=torch.float64), torch.cat(hidden_grads), weight_grad


def errors(true: Gradients, got: Gradients) -> dict[str, float]:
    """Relative, in the 2-norm."""
    names = "value_error", "hidden_error", "weight_error"
    pairs = zip(names, true, got, strict=True)
    return {name: ((its.to(want) - want).norm() / want.norm()).item() for name, want, its in pairs}


def cpu_peak_bytes(name: str, case: Case) -> int:
    torch.set_num_threads(case.threads)
    return own_peak_bytes(providers(case, make_inputs(case, "cpu"))[name])


def extra_bytes(name: str, case: Case, function: Function, inputs: Inputs) -> int | None:
    """Peak memory beyond inputs and gradients; on a CPU only Linux tells."""
    gradients = inputs.hidden.nbytes + inputs.weight.nbytes
    if inputs.hidden.is_cuda:
        return cuda_peak_bytes(function) - gradients
    return in_a_new_process(cpu_peak_bytes, name, case) - gradients if sys.platform == "linux" else None


def measure(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """The record of a JSON line. What does not run, for want of memory say, is recorded with its reason, unless it is ours."""
    if case.threads:
        torch.set_num_threads(case.threads)
    inputs = make_inputs(case, device)
    true = truth(inputs, case.temperature, **method_of(case.beta, case.mix))
    functions = providers(case, inputs)
    results: dict[str, dict[str, Any]] = {}
    for name, function in list(functions.items()):
        try:
            got = function()
        except (RuntimeError, ImportError) as error:
            if name == OURS:
                raise
            results[name] = {"failed": (str(error).strip() or type(error).__name__).splitlines()[0]}
            del functions[name]
            continue
        results[name] = {} if got is None else errors(true, got)
    clocked = times(functions, rounds, device)
    for name, own in clocked.items():
        results[name] |= spread(own) | {"extra_bytes": extra_bytes(name, case, functions[name], inputs)}
        for figure, other in (("speedup", "eager"), ("of_matmuls", "matmuls alone")):
            ratios = [theirs / its for theirs, its in zip(clocked.get(other, ()), own, strict=False)]
            if ratios:
                results[name] |= {figure: statistics.median(ratios), f"{figure}_range": [min(ratios), max(ratios)]}
    return case._asdict() | {"rounds": rounds, "providers": results}


def table_lines(record: dict[str, Any]) -> Iterator[str]:
    method = "".join(f", {name} {record[name]:g}" for name in ("beta", "mix") if record[name] is not None)
    start = "| {rows} x ({student_width}, {teacher_width}, {columns}){0} | ".format(method, **record)
    start += "{dtype} | {temperature:g} | ".format(**record)
    start += f"{'on' if record['labels'] else 'off'} | {record['threads'] or '-'} | "
    for name, r in record["providers"].items():
        if "failed" in r:
            yield f"{start}{name} | failed: {r['failed'].replace('|', '/')[:120]} |" + " |" * 6
            continue
        memory = "-" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**20:.0f}"
        speed = "-"
        if "speedup" in r:
            speed = "{speedup:.2f} ({0:.2f}-{1:.2f})".format(*r["speedup_range"], **r)
        wrong = "{value_error:.0e} | {hidden_error:.0e} | {weight_error:.0e} |" if "value_error" in r else "- | - | - |"
        times_s = "{0} | {ms:.2f} ({ms_20:.2f}-{ms_80:.2f}) | {1} | {of_matmuls:.0%} | {2} | " + wrong
        yield start + times_s.format(name, speed, memory, **r)


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> Iterator[Case]:
    grid = itertools.product(
        args.threads if args.device == "cpu" else (0,),
        args.dtypes or DTYPES[args.device],
        args.shapes or SHAPES[args.device],
        args.tokens or TOKENS[args.device],
        args.labels,
    )
    for threads, dtype, shape, rows, labels in grid:
        student_width, teacher_width, columns = map(int, shape.split(","))
        yield Case(
            rows,
            student_width,
            teacher_width,
            columns,
            dtype,
            args.temperature,
            labels == "on",
            threads,
            args.beta,
            args.mix,
        )


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help=f"default {TOKENS}")
    parser.add_argument("--shapes", nargs="+", metavar="D,E,V", help=f"default {SHAPES}")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(TOLERANCE), help=f"default {DTYPES}")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--beta", type=float, help="Jensen-Shannon with this beta; default forward KL")
    parser.add_argument("--mix", type=float, help="a target of this share of the teacher's logits")
    parser.add_argument("--labels", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="threads of PyTorch on a CPU, in turn")
    parser.add_argument("--rounds", type=int, help=f"timed rounds a case, at least 2; default {ROUNDS}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is a GPU")
    parser.add_argument("--out", type=Path, help="folder for cases.jsonl")
    args = parser.parse_args(words)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rounds = args.rounds or ROUNDS[args.device]
    if rounds < 2:
        parser.error(f"--rounds must be at least 2, got {rounds}")
    where = environment(args.device)
    print("  \n".join(f"{name}: {value}" for name, value in where.items()) + f"\n\n{HEADER}")
    print("|---" * HEADER.count(" | ") + "|---|")
    for case in cases(args):
        record = where | measure(case, args.device, rounds)
        for line in table_lines(record):
            print(line, flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / "cases.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        result = record["providers"][OURS]
        if not max(result["hidden_error"], result["weight_error"]) <= TOLERANCE[case.dtype]:
            sys.exit(f"{OURS} is not the loss it should be: {result}")


if __name__ == "__main__":
    main()
