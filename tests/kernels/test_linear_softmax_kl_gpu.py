"""linear_softmax_kl on a GPU: what a CPU cannot show. `./launch/test.sh -m gpu tests/kernels`"""

import math
from typing import Any

import pytest
import torch

from kd_core.kernels import linear_softmax_kl as module
from kd_core.kernels import softmax_kl
from kd_core.kernels.bench_linear import Case, eager, errors, forward_backward, make_inputs, ours, truth, unfused
from kd_core.kernels.linear_softmax_kl import linear_softmax_kl

pytestmark = pytest.mark.gpu

CASE = Case(300, 256, 384, 30522, "bfloat16", 2.0, labels=True, threads=0)


@pytest.mark.parametrize("columns", [1000, 30522, 50257])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chunk_bytes", [None, 64 * 50257])
def test_equals_float64(columns, dtype, chunk_bytes, monkeypatch) -> None:
    if chunk_bytes:
        monkeypatch.setattr(module, "GPU_CHUNK_BYTES", chunk_bytes)  # a few rows each
    inputs = make_inputs(CASE._replace(columns=columns, dtype=dtype), "cuda")
    got = errors(truth(inputs, 2.0), forward_backward(ours, inputs, 2.0))
    # In bfloat16 the gradient of the logits and the result are rounded.
    bound = 1e-5 if dtype == "float32" else 5e-3
    assert got["value_error"] <= 2e-6 and max(got["hidden_error"], got["weight_error"]) <= bound, got


def test_logits_of_float32_keep_the_gradient_exact() -> None:
    """Out of the same matrices of 16 bits: at least a hundred times the accuracy of the logits' gradient."""
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    hidden, weight = make(64, 512), make(30522, 512) * (2 / math.sqrt(512))
    other = weight + 0.1 * make(30522, 512) * (2 / math.sqrt(512))  # a teacher near the student
    exact = [hidden.double() @ matrix.double().t() for matrix in (weight, other)]
    logits = exact[0].requires_grad_()
    kd, _ = softmax_kl.softmax_kl_reference(logits, exact[1], temperature=2.0)
    (want,) = torch.autograd.grad(kd.sum(), logits)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        rows = []
        for matrix in (weight, other):
            out = torch.empty(64, 30522, device="cuda", dtype=dtype)
            module._matmul_(out, hidden, matrix.t(), alpha=1.0)
            rows.append(out.float().requires_grad_())
        rows[1].requires_grad_(False)
        softmax_kl.softmax_kl_sum(*rows, temperature=2.0)[0].backward()
        found.append(((rows[0].grad.double() - want).norm() / want.norm()).item())
    assert found[0] <= 1e-5 and found[1] >= 100 * found[0], found


@pytest.mark.parametrize("options", [{}, {"student_softcap": 5.0, "teacher_softcap": 4.0, "student_logit_scale": 0.7}])
@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_every_option_equals_the_reference(direction, options) -> None:
    inputs = make_inputs(CASE._replace(dtype="float32"), "cuda")
    biases = {f"{side}_bias_V": torch.randn(CASE.columns, device="cuda") for side in ("student", "teacher")}
    common: Any = {**options, **biases, "direction": direction, "temperature": 2.0, "label_weight": 0.3}
    common |= {"row_weight_N": torch.rand(CASE.rows, device="cuda"), "valid_columns": 30000}
    common["mix"] = torch.rand(CASE.rows, device="cuda")
    labels = inputs.labels.clamp(max=29999)
    results = []
    for impl in ("auto", "reference"):
        bias = biases["student_bias_V"].detach().requires_grad_()
        loss, *_ = linear_softmax_kl(*inputs[:4], labels, impl=impl, **common | {"student_bias_V": bias})
        results.append([loss, *torch.autograd.grad(0.5 * loss, (inputs.hidden, inputs.weight, bias))])
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()


def test_nothing_waits_for_the_host() -> None:
    inputs = make_inputs(CASE, "cuda")
    weight, rows = torch.ones(CASE.rows, device="cuda"), torch.arange(0, CASE.rows, 2, device="cuda")
    weight[::3] = 0.0

    def step() -> None:
        for options in ({"row_weight_N": weight}, {"rows_M": rows, "row_weight_N": weight}):
            loss, *_ = linear_softmax_kl(*inputs, label_weight=0.5, chunk_rows=128, **options)
            torch.autograd.grad(loss * 0.5, (inputs.hidden, inputs.weight))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_left_out_by_the_caller() -> None:
    inputs = make_inputs(CASE, "cuda")
    rows, weight = torch.arange(0, CASE.rows, 2, device="cuda"), torch.zeros(CASE.rows, device="cuda")
    weight[rows] = 1.0
    results = []
    for options in ({"rows_M": rows}, {"row_weight_N": weight}):
        loss, *_ = linear_softmax_kl(*inputs, label_weight=0.5, **options)
        results.append([loss, *torch.autograd.grad(loss, (inputs.hidden, inputs.weight))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_memory_is_a_chunk_and_the_gradients(monkeypatch) -> None:
    budget = 64 << 20
    monkeypatch.setattr(module, "GPU_CHUNK_BYTES", budget)
    inputs = make_inputs(CASE._replace(rows=4096, columns=50257), "cuda")
    forward_backward(ours, inputs, 2.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(ours, inputs, 2.0)
    # Gradients in float32 and, for a moment, in bfloat16; cuBLAS has a workspace of its own.
    gradients = 6 * (inputs.hidden.numel() + inputs.weight.numel())
    assert torch.cuda.max_memory_allocated() - before <= budget + gradients + (40 << 20)


def test_cuda_graph_replays_on_new_hidden_states() -> None:
    inputs = make_inputs(CASE, "cuda")
    step = lambda: forward_backward(ours, inputs, 2.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        inputs.hidden.normal_()
    graph.replay()
    replayed = [tensor.clone() for tensor in recorded]
    for got, want in zip(replayed, step(), strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_equals_eager() -> None:
    inputs = make_inputs(CASE, "cuda")
    compiled = torch.compile(lambda inputs, tau: ours(inputs, tau) / CASE.rows, fullgraph=True)
    plain = forward_backward(lambda inputs, tau: ours(inputs, tau) / CASE.rows, inputs, 2.0)
    for got, want in zip(forward_backward(compiled, inputs, 2.0), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-5)


def test_autocast() -> None:
    """float32 parameters under autocast multiply in bfloat16, as a linear layer's do."""
    inputs = make_inputs(CASE._replace(dtype="float32"), "cuda")
    true = truth(inputs, 2.0)
    with torch.autocast("cuda", torch.bfloat16):
        got = forward_backward(ours, inputs, 2.0)
    assert got[1].dtype == got[2].dtype == torch.float32
    assert max(errors(true, got).values()) <= 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4096, 16384])
def test_faster_than_eager_and_than_logits_in_16_bits(rows) -> None:
    """At Llama 3.2 1B's head with an 8B teacher; the whole table: ./launch/bench.sh linear."""
    from kd_core.kernels.bench_measure import cuda_times

    inputs = make_inputs(Case(rows, 2048, 4096, 128256, "bfloat16", 2.0, labels=True, threads=0), "cuda")
    losses = {"eager": eager, "unfused": unfused, "ours": ours}
    functions = {name: (lambda loss=loss: forward_backward(loss, inputs, 2.0)) for name, loss in losses.items()}
    times = cuda_times(functions, rounds=5)
    medians = {name: sorted(own)[len(own) // 2] for name, own in times.items()}
    assert medians["ours"] < medians["eager"], medians
