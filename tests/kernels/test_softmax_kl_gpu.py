"""Triton's kernels on a GPU: what the interpreter cannot show. `./launch/test.sh -m gpu tests/kernels`"""

import pytest
import torch

from kd_core.kernels import softmax_kl_triton
from kd_core.kernels.softmax_kl import softmax_kl, softmax_kl_reference, softmax_kl_sum
from kd_core.kernels.softmax_kl_arguments import DIRECTIONS
from kd_core.kernels.softmax_kl_torch import Options

pytestmark = pytest.mark.gpu
VOCABULARIES = (2, 7, 1000, 1271, 4096, 4097, 16384, 16385, 30522, 32000, 50257, 128256, 151936)


def make(num_rows, columns, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    normal = lambda: torch.randn(num_rows, columns, device="cuda", generator=generator)
    student = 3 * normal()
    teacher, labels = student + normal(), torch.randint(columns, (num_rows,), device="cuda", generator=generator)
    labels[1::3] = -100
    return student.to(dtype), teacher.to(dtype), labels


def gradient_of(function, student, teacher, labels, **options):
    student = student.detach().requires_grad_()
    kd, label = function(student, teacher, labels, **options)
    weight = torch.linspace(-1.0, 2.0, len(student), device="cuda")
    ((weight * kd).sum() + (0.5 * weight * label).sum()).backward()
    return kd.detach(), label.detach(), student.grad


def assert_rounded(got, want) -> None:
    """bf16: as if the exact gradient had been rounded once."""
    assert (got.double() - want).norm() <= 2.2e-3 * want.norm()
    rounded = want.to(torch.bfloat16)
    ulp = torch.nextafter(rounded, torch.full_like(rounded, torch.inf)) - rounded
    # Where p and q cancel, the error is that of tau p and tau q, not of their difference.
    off = (got.double() - rounded.double()).abs() > ulp.double().abs() + 1e-7
    assert off.double().mean() <= 1e-3


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mix", [None, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("columns", VOCABULARIES)
def test_equals_float64(columns, dtype, temperature, mix, direction) -> None:
    student, teacher, labels = make(13, columns, dtype)
    options = {"temperature": temperature, "direction": direction, "mix": mix}
    kd, label, gradient = gradient_of(softmax_kl, student, teacher, labels, impl="triton", **options)
    kd_64, label_64, want = gradient_of(softmax_kl_reference, student.double(), teacher, labels, **options)
    torch.testing.assert_close(kd.double(), kd_64, rtol=2e-6, atol=1e-6 * temperature**2)
    torch.testing.assert_close(label.double(), label_64, rtol=2e-6, atol=2e-6)
    if dtype == torch.bfloat16:
        assert_rounded(gradient, want)
    else:
        assert (gradient.double() - want).norm() <= {torch.float32: 3e-6, torch.float16: 5e-4}[
            dtype
        ] * want.norm() + 1e-6


@pytest.mark.parametrize("columns", VOCABULARIES)
def test_sum_equals_rows(columns) -> None:
    student, teacher, labels = make(13, columns, torch.float32)
    weight = torch.rand(13, device="cuda")
    kd, label, _ = gradient_of(softmax_kl, student, teacher, labels, temperature=2.0)
    for upstream in (1.0, 0.5):
        leaf = student.detach().requires_grad_()
        options = {"kd_weight": 0.7, "label_weight": 0.3, "row_weight_N": weight, "temperature": 2.0}
        loss, kd_sum, label_sum = softmax_kl_sum(leaf, teacher, labels, **options)
        (upstream * loss).backward()
        exact = student.double().requires_grad_()
        kd_64, label_64 = softmax_kl_reference(exact, teacher, labels, temperature=2.0)
        (upstream * (weight * (0.7 * kd_64 + 0.3 * label_64)).sum()).backward()
        torch.testing.assert_close(kd_sum, (weight * kd).sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(label_sum, (weight * label).sum(), rtol=1e-5, atol=1e-5)
        assert (leaf.grad.double() - exact.grad).norm() <= 3e-6 * exact.grad.norm()


@pytest.mark.parametrize("columns", [30522, 32000, 50257, 128256, 151936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cluster_equals_streaming(columns, dtype, direction) -> None:
    if torch.cuda.get_device_capability() < (9, 0) or not softmax_kl_triton.clusters_compile():
        pytest.skip("needs sm_90 and a Triton that reduces over clusters")
    student, teacher, labels = make(40, columns, dtype)
    options = Options(2.0, 2.0, 0.3, direction, 0.9, -100, columns)
    streaming = softmax_kl_triton.STREAMING_TWICE if direction == "js" else softmax_kl_triton.STREAMING
    results = []
    for plan in (streaming, softmax_kl_triton.cluster_plan(columns)):
        grad = torch.empty_like(student)
        sums = softmax_kl_triton.weighted_sum(student, teacher, labels, options, None, 0.7, 0.3, grad, plan)
        results.append((*sums, grad))
    for streaming, cluster in zip(*results, strict=True):
        torch.testing.assert_close(
            cluster, streaming, rtol=1e-5 if streaming.dtype == torch.float32 else 8e-3, atol=1e-6
        )


def test_rows_beyond_32_bits() -> None:
    """More than 2^31 elements: the last rows are right."""
    columns = 151936
    num_rows = 2**31 // columns + 40
    if torch.cuda.mem_get_info()[0] < 4 * 2 * num_rows * columns:
        pytest.skip("needs 20 GB of GPU memory")
    student = torch.empty(num_rows, columns, dtype=torch.bfloat16, device="cuda").normal_()
    teacher, labels = student.roll(1, 0), torch.randint(columns, (num_rows,), device="cuda")
    student.requires_grad_()
    kd, label = softmax_kl(student, teacher, labels, temperature=2.0)
    (kd.sum() + label.sum()).backward()
    last = student.detach()[-3:].double().requires_grad_()
    kd_64, label_64 = softmax_kl_reference(last, teacher[-3:], labels[-3:], temperature=2.0)
    (kd_64.sum() + label_64.sum()).backward()
    torch.testing.assert_close(kd[-3:].double(), kd_64, rtol=1e-5, atol=1e-5)
    assert_rounded(student.grad[-3:], last.grad)


@pytest.mark.parametrize("columns", [1000, 30522])
def test_nothing_waits_for_the_host_and_memory_is_the_gradient(columns) -> None:
    student, teacher, labels = make(512, columns)
    student.requires_grad_()

    def step() -> None:
        student.grad = None
        kd, label = softmax_kl(student, teacher, labels, temperature=2.0)
        (0.5 * kd + 0.5 * label).sum().backward()
        softmax_kl_sum(student, teacher, labels, temperature=2.0, label_weight=1.0)[0].backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    student.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kd, label = softmax_kl(student, teacher, labels, temperature=2.0)
    torch.autograd.backward([kd, label], [torch.ones_like(kd), torch.ones_like(label)])
    # Allocations are rounded up to 512 bytes each; there are about a dozen.
    assert torch.cuda.max_memory_allocated() - before <= student.nbytes + 64 * 512 + 16 * 512


@pytest.mark.parametrize("columns", [1000, 30522])
@pytest.mark.parametrize("form", [softmax_kl, softmax_kl_sum])
def test_cuda_graph_replays_on_new_logits(form, columns) -> None:
    student, teacher, labels = make(64, columns)
    student.requires_grad_()

    def step() -> None:
        student.grad = None
        losses = form(student, teacher, labels, temperature=2.0)
        (losses[0].sum() if form is softmax_kl_sum else (losses[0] + losses[1]).sum()).backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    recorded = student.grad
    with torch.no_grad():
        student.copy_(make(64, columns, seed=1)[0])
    graph.replay()
    replayed = recorded.clone()
    step()
    assert torch.equal(replayed, student.grad) and replayed.abs().max() > 0


@pytest.mark.parametrize("form", [softmax_kl, softmax_kl_sum])
def test_compiled_equals_eager(form) -> None:
    _, teacher, labels = make(64, 30522)
    weight = torch.randn(16, 30522, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(64, 16, device="cuda", dtype=torch.bfloat16)

    def step(hidden):
        losses = form(hidden @ weight, teacher, labels, temperature=2.0)
        return losses[0].sum() / 64

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = hidden.detach().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=1e-4)


def test_deterministic() -> None:
    student, teacher, labels = make(64, 50257)
    runs = [gradient_of(softmax_kl, student, teacher, labels, temperature=2.0) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_label_out_of_range_is_loud() -> None:
    student, teacher, labels = make(4, 1000)
    labels[2] = 1000
    _, label, gradient = gradient_of(softmax_kl, student, teacher, labels)
    assert label.isnan().tolist() == [False, False, True, False] and gradient.isfinite().all()


def test_launches_at_1000_classes() -> None:
    student, teacher, labels = make(1024, 1000)
    student.requires_grad_()
    ones = torch.ones(1024, device="cuda")

    def step() -> None:
        student.grad = None
        torch.autograd.backward(softmax_kl(student, teacher, labels, temperature=2.0), [ones, ones])

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    assert sum(event.count for event in profile.key_averages() if "_kernel" in event.key) <= 3
