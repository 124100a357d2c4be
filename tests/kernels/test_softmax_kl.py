"""softmax_kl against its float64 definition, finite differences and properties that hold for any implementation."""

import math

import pytest
import torch

from kd_core.kernels import softmax_kl_native, softmax_kl_torch, softmax_kl_triton
from kd_core.kernels.softmax_kl import softmax_kl, softmax_kl_reference
from kd_core.kernels.softmax_kl_arguments import DIRECTIONS

INF = math.inf
# What `impl` can mean. Triton's kernels run in its interpreter (tests/conftest.py), each as if it served every V.
VARIANTS = ("torch", "native", "resident", "streaming", "reference")
# Shapes: one row and one column, odd sizes, several programs of several rows, several chunks (CHUNK_BYTES below), a
# vocabulary with a ragged tail.
SHAPES = ((1, 1), (5, 7), (11, 100), (4, 1000), (4, 30522))
CHUNK_BYTES = 3 * 4 * 1000  # three rows of 1000: the last chunk of 4 rows has one


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_kl_torch, "CPU_CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture(params=VARIANTS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    variant = request.param
    if variant == "torch":
        monkeypatch.setattr(softmax_kl_native, "supports", lambda *_: False)
    if variant == "native":
        if softmax_kl_native.library() is None:
            pytest.skip("no C compiler here")
        return "torch"
    if variant in ("resident", "streaming"):
        if torch.cuda.is_available():
            pytest.skip("Triton compiles here; tests marked gpu cover it")
        monkeypatch.setattr(softmax_kl_triton, "plan", PLANS[variant])
        return "triton"
    return variant


SERVED = softmax_kl_triton.plan
# Two tiles where there are columns for them, and a streaming loop of several turns.
PLANS = {
    "resident": lambda columns, **exponentials: (
        SERVED(columns, **exponentials) if columns <= 1000 else softmax_kl_triton.cluster_plan(columns)
    ),
    "streaming": lambda columns, *, js=False, **_: (
        softmax_kl_triton.STREAMING_TWICE if js else softmax_kl_triton.STREAMING
    )._replace(block=64 if columns <= 1000 else 256),
}


def make(num_rows: int, num_columns: int, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    """Student's and teacher's logits [N, V] and labels [N], every third of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(num_rows, num_columns, generator=generator)
    teacher = student + torch.randn(num_rows, num_columns, generator=generator)
    labels = torch.randint(0, num_columns, (num_rows,), generator=generator)
    labels[1::3] = -100
    return student, teacher, labels


def weights(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upstream gradients of kd_N and label_N: different in every row, of both signs."""
    generator = torch.Generator().manual_seed(99)
    return torch.randn(num_rows, generator=generator), torch.randn(num_rows, generator=generator)


def value_and_gradient(function, student, teacher, labels, upstream=None, **options):
    """Both values, and the gradient of the sum weighted by `upstream` in the student's logits."""
    student = student.detach().requires_grad_()
    kd, label = function(student, teacher, labels, **options)
    kd_weight, label_weight = weights(len(student)) if upstream is None else upstream
    loss = (kd * kd_weight.to(kd.dtype)).sum() + (label * label_weight.to(label.dtype)).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    return kd.detach(), label.detach(), gradient


def truth(student, teacher, labels, upstream=None, **options):
    """The same in float64, from the very values that the implementation saw."""
    student = student.double()
    return value_and_gradient(softmax_kl_reference, student, teacher, labels, upstream, **options)


def assert_close(got, want, gradient_rtol: float = 3e-6, value_rtol: float = 2e-6) -> None:
    """Values within 1e-6 nats (times tau^2, here up to 9) and relatively; the gradient of each row in the 2-norm."""
    for value, expected in zip(got[:2], want[:2], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=value_rtol, atol=9e-6)
    error, size = (got[2].double() - want[2]).norm(dim=1), want[2].norm(dim=1)
    # Where p and q nearly cancel the error is that of tau p and tau q, not of their difference.
    assert (error <= gradient_rtol * size + 2e-6).all(), (error, size)


OPTIONS = (
    {},
    {"temperature": 2.0},
    {"temperature": 0.5},
    {"temperature": 4.0, "teacher_temperature": 1.5},
    {"temperature": 1.0, "teacher_temperature": 3.0},
    {"temperature": "per row"},
    {"temperature": 2.0, "teacher_temperature": "per row"},
)
ONE_OF_EACH = (
    OPTIONS[0],
    OPTIONS[2],
    OPTIONS[3],
)  # label terms: of the KL's exponential, of one of their own, of a power


def with_tensors(options: dict, num_rows: int) -> dict:
    per_row = torch.linspace(0.7, 3.0, num_rows)
    return {name: per_row if value == "per row" else value for name, value in options.items()}


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_equal_float64(shape, options, direction, impl) -> None:
    if impl == "triton" and shape[1] > 5000:
        shape = (3, 4099)  # the interpreter is slow
    student, teacher, labels = make(*shape)
    options = with_tensors(options, shape[0]) | {"direction": direction}
    want = truth(student, teacher, labels, **options)
    # The plain sum of p (log p - log q) in float32 is less accurate than sums shifted by the maximum.
    value_rtol = 1e-5 if impl == "reference" else 2e-6
    got = value_and_gradient(softmax_kl, student, teacher, labels, impl=impl, **options)
    assert_close(got, want, value_rtol=value_rtol)


@pytest.mark.parametrize("temperature", [3.0, 8.0, 40.0])
def test_label_term_at_high_temperatures(temperature, impl) -> None:
    """Powers of the exponentials at hand, and exponentials of its own that grow by far more than the others'."""
    student, teacher, labels = make(4, 3000)
    student[:2, 1200:] += 100.0
    upstream = torch.ones(4), torch.ones(4)
    options = {"temperature": temperature, "upstream": upstream}
    got = value_and_gradient(softmax_kl, student, teacher, labels, impl=impl, **options)
    want = truth(student, teacher, labels, **options)
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-6, atol=2e-5)
    assert ((got[2].double() - want[2]).norm(dim=1) <= 1e-5 * want[2].norm(dim=1)).all()


@pytest.mark.parametrize(
    "tau", [torch.tensor([2.0]).expand(3), torch.arange(1.0, 7.0)[::2]], ids=["expanded", "strided"]
)
def test_temperatures_need_not_be_adjacent_in_memory(tau, impl) -> None:
    student, teacher, labels = make(3, 100)
    got = value_and_gradient(softmax_kl, student, teacher, labels, temperature=tau, impl=impl)
    assert_close(got, truth(student, teacher, labels, temperature=tau))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_gradient_equals_finite_differences(options, direction) -> None:
    student, teacher, labels = make(5, 7)
    options = with_tensors(options, 5)
    function = lambda logits: softmax_kl_reference(logits, teacher, labels, direction=direction, **options)
    assert torch.autograd.gradcheck(function, student.double().requires_grad_(), eps=1e-6, atol=1e-7, rtol=1e-6)


def test_reference_equals_torch_functional() -> None:
    student, teacher, labels = (x.double() if x.is_floating_point() else x for x in make(4, 1000))
    kd, label = softmax_kl_reference(student, teacher, labels, temperature=2.0)
    log_q, log_p = torch.log_softmax(student / 2.0, 1), torch.log_softmax(teacher / 2.0, 1)
    kl = torch.nn.functional.kl_div
    torch.testing.assert_close(kd, 4.0 * kl(log_q, log_p, log_target=True, reduction="none").sum(1))
    torch.testing.assert_close(label, torch.nn.functional.cross_entropy(student, labels, reduction="none"))
    reverse, _ = softmax_kl_reference(student, teacher, labels, temperature=2.0, direction="reverse")
    torch.testing.assert_close(reverse, 4.0 * kl(log_p, log_q, log_target=True, reduction="none").sum(1))


def test_auto_is_torch_on_a_cpu() -> None:
    student, teacher, labels = make(4, 1000)
    got, want = (value_and_gradient(softmax_kl, student, teacher, labels, impl=impl) for impl in ("auto", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_ignored_rows_keep_their_kd_term(impl) -> None:
    student, teacher, labels = make(4, 1000)
    kd, label, gradient = value_and_gradient(softmax_kl, student, teacher, labels, impl=impl)
    kd_alone, zeros, kd_gradient = value_and_gradient(softmax_kl, student, teacher, None, impl=impl)
    ignored = labels == -100
    assert (label[ignored] == 0).all() and (label[~ignored] > 0).all() and (zeros == 0).all()
    assert (kd[ignored] > 0).all() and torch.equal(kd, kd_alone)
    torch.testing.assert_close(gradient[ignored], kd_gradient[ignored], rtol=1e-6, atol=1e-8)
    assert kd_gradient[ignored].abs().max() > 1e-3
    with_other_index = value_and_gradient(
        softmax_kl, student, teacher, labels.masked_fill(ignored, 5), impl=impl, ignore_index=5
    )
    unaffected = labels != 5
    assert torch.equal(with_other_index[2][unaffected], gradient[unaffected])


def test_all_rows_ignored(impl) -> None:
    student, _, labels = make(4, 1000)
    labels = torch.full_like(labels, -100)
    _, label, gradient = value_and_gradient(softmax_kl, student, None, labels, impl=impl)
    assert (label == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_columns_that_take_no_part(temperature, direction, impl) -> None:
    student, teacher, labels = make(4, 1000)
    options = {"impl": impl, "direction": direction, "temperature": temperature}
    want = value_and_gradient(softmax_kl, student, teacher, labels, **options)
    # Whatever is in the padding: the largest logit of the row, infinities or NaN.
    padding = torch.tensor([1e4, INF, -INF, math.nan]).expand(4, 4)
    wide_student, wide_teacher = torch.cat((student, padding), 1), torch.cat((teacher, padding, padding), 1)

    wider_teacher = value_and_gradient(softmax_kl, student, wide_teacher, labels, **options)
    assert all(torch.equal(a, b) for a, b in zip(wider_teacher, want, strict=True))
    for some_teacher in (wide_teacher, teacher):
        got = value_and_gradient(softmax_kl, wide_student, some_teacher, labels, valid_columns=1000, **options)
        assert_close((*got[:2], got[2][:, :1000]), [x.double() for x in want])
        assert (got[2][:, 1000:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_teacher_the_label_term_is_the_same(temperature, impl) -> None:
    student, teacher, labels = make(4, 1000)
    upstream = torch.zeros(4), weights(4)[1]
    kd, label, gradient = value_and_gradient(
        softmax_kl, student, None, labels, upstream, impl=impl, temperature=temperature
    )
    want = value_and_gradient(softmax_kl, student, teacher, labels, upstream, impl=impl, temperature=temperature)
    assert (kd == 0).all()
    torch.testing.assert_close(label, want[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, want[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
def test_dtypes(student_dtype, teacher_dtype, impl) -> None:
    if impl == "triton" and student_dtype == torch.float64:
        pytest.skip("its kernels compute in float32; refused")
    student, teacher, labels = make(4, 1000)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    want = truth(student, teacher, labels, temperature=2.0)
    got = value_and_gradient(softmax_kl, student, teacher, labels, impl=impl, temperature=2.0)
    assert got[2].dtype == student_dtype
    # Half a unit in the last place of the gradient's dtype, and a little for the arithmetic before the store; Triton's
    # interpreter truncates to bfloat16 where hardware rounds.
    units = 1.0 if impl == "triton" else 0.51
    rtol = max(units * torch.finfo(student_dtype).eps, 3e-6)
    assert_close(got, want, rtol)


def test_upstream_enters_before_rounding() -> None:
    """Loss weights such as 1 / tokens would underflow in float16 if they were multiplied onto a rounded gradient."""
    student, teacher, labels = make(13, 1000)
    student = student.half()
    upstream = torch.full((13,), 2.0**12), torch.full((13,), 2.0**12)
    got = value_and_gradient(softmax_kl, student, teacher, labels, upstream)
    assert_close((*got[:2], got[2]), truth(student, teacher, labels, upstream), 0.51 * torch.finfo(torch.float16).eps)
    # Of the elements that are subnormal without the factor, most would have lost bits: here they have not.
    want = truth(student, teacher, labels, upstream)[2]
    small = (want.abs() > 2.0**-14) & (want.abs() < 2.0**-4)
    assert small.sum() > 1000
    assert ((got[2].double() - want).abs()[small] <= 2.0**-10.5 * want.abs()[small]).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_strides(direction, impl) -> None:
    student, teacher, labels = make(4, 1000)
    want = value_and_gradient(softmax_kl, student, teacher, labels, direction=direction, impl=impl)
    layouts = {
        "rows apart": lambda x: torch.stack((x, x + 1), dim=1)[:, 0],
        "misaligned": lambda x: torch.cat((x[:, :3], x), dim=1)[:, 3:],
        "columns apart": lambda x: x.t().contiguous().t(),
    }
    for name, layout in layouts.items():
        strided = layout(student), layout(teacher)
        assert not strided[0].is_contiguous(), name
        got = value_and_gradient(softmax_kl, *strided, labels, direction=direction, impl=impl)
        assert_close(got, [x.double() for x in want])
    one_teacher = teacher[:1].expand(4, -1)
    got = value_and_gradient(softmax_kl, student, one_teacher, labels, direction=direction, impl=impl)
    assert_close(got, truth(student, one_teacher, labels, direction=direction))


@pytest.mark.parametrize("teacher", [True, False])
def test_no_rows(teacher, impl) -> None:
    logits = torch.empty(0, 7)
    got = value_and_gradient(
        softmax_kl, logits, logits if teacher else None, torch.empty(0, dtype=torch.int64), impl=impl
    )
    assert [x.shape for x in got] == [(0,), (0,), (0, 7)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
class TestMinusInfinity:
    """Rows of four columns, so that what is wrong is easy to see."""

    labels = torch.tensor([1])
    upstream = torch.ones(1), torch.ones(1)

    def run(self, student, teacher, impl, temperature, direction="forward", labels=labels):
        rows = torch.tensor([student]), None if teacher is None else torch.tensor([teacher])
        options = {"temperature": temperature, "direction": direction}
        got = value_and_gradient(softmax_kl, *rows, labels, self.upstream, impl=impl, **options)
        want = truth(*rows, labels, self.upstream, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
        return got

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_on_both_sides_is_as_if_the_column_were_absent(self, direction, impl, temperature) -> None:
        got = self.run([0.5, 1.0, -INF, 2.0], [1.5, 0.0, -INF, 1.0], impl, temperature, direction)
        short = self.run([0.5, 1.0, 2.0], [1.5, 0.0, 1.0], impl, temperature, direction)
        torch.testing.assert_close(got[0], short[0], rtol=1e-5, atol=0)
        assert got[0] > 0.01 and got[2][0, 2] == 0
        torch.testing.assert_close(got[2][:, [0, 1, 3]], short[2], rtol=1e-5, atol=1e-6)

    def test_teacher_excludes(self, impl, temperature) -> None:
        kd, _, gradient = self.run([0.5, 1.0, 0.0, 2.0], [1.5, 0.0, -INF, 1.0], impl, temperature)
        assert 0 < kd < INF and gradient[0, 2] > 0.01

    def test_student_excludes_what_the_teacher_allows(self, impl, temperature) -> None:
        kd, label, gradient = self.run([0.5, 1.0, -INF, 2.0], [1.5, 0.0, 1.0, 1.0], impl, temperature)
        assert kd == INF and label < INF and gradient.isfinite().all() and gradient[0, 2] < -0.1

    def test_reverse_teacher_excludes(self, impl, temperature) -> None:
        rows = [0.5, 1.0, 0.0, 2.0], [1.5, 0.0, -INF, 1.0]
        kd, _, gradient = self.run(*rows, impl, temperature, "reverse", labels=None)
        assert kd == INF and (gradient == 0).all()

    def test_reverse_student_excludes(self, impl, temperature) -> None:
        kd, _, gradient = self.run([0.5, 1.0, -INF, 2.0], [1.5, 0.0, 1.0, 1.0], impl, temperature, "reverse")
        assert 0 < kd < INF and gradient[0, 2] == 0

    def test_label_excluded(self, impl, temperature) -> None:
        _, label, gradient = self.run([0.5, -INF, 1.0, 2.0], None, impl, temperature)
        assert label == INF and gradient[0, 1] == -1

    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("empty", ["student", "teacher", "both"])
    def test_whole_row(self, empty, direction, impl, temperature) -> None:
        nothing, something = [-INF] * 4, [0.5, 1.0, 0.0, 2.0]
        student, teacher = (nothing if empty in (side, "both") else something for side in ("student", "teacher"))
        kd, label, gradient = self.run(student, teacher, impl, temperature, direction)
        assert kd == 0
        if empty == "teacher":
            assert label > 0.5 and gradient[0, 1] < -0.5
        else:
            assert label == 0 and (gradient == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("side", [0, 1])
def test_not_a_number_is_not_hidden(side, bad, direction, impl) -> None:
    rows = [torch.tensor([[0.5, 1.0, 0.0, 2.0]] * 2), torch.tensor([[1.5, 0.0, 1.0, 1.0]] * 2)]
    rows[side][0, 2] = bad
    options = {"impl": impl, "direction": direction, "temperature": 2.0}
    kd, _, gradient = value_and_gradient(softmax_kl, *rows, None, **options)
    assert kd[0].isnan() and gradient[0].isnan().any() and kd[1].isfinite() and gradient[1].isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_not_a_number_where_the_student_excludes_is_not_hidden(direction, impl) -> None:
    student, teacher = torch.tensor([[-INF, 1.0, 0.0, 2.0]]), torch.tensor([[math.nan, 0.0, 1.0, 1.0]])
    options = {"impl": impl, "direction": direction, "temperature": 2.0}
    kd, _, gradient = value_and_gradient(softmax_kl, student, teacher, None, **options)
    assert kd.isnan() and gradient.isnan().any()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 3.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_have_exactly_zero_kl(dtype, temperature, direction, impl) -> None:
    student = make(4, 1000)[0].to(dtype)
    options = {"temperature": temperature, "direction": direction, "impl": impl}
    kd, _, gradient = value_and_gradient(softmax_kl, student, student.clone(), None, **options)
    assert (kd == 0).all() and gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_is_never_negative(direction, impl) -> None:
    student, _, _ = make(4 if impl == "triton" else 200, 1000)
    noise = torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    for size in (1e-2, 1e-4, 1e-6):
        kd, _ = softmax_kl(student, student + size * noise, direction=direction, impl=impl)
        assert (kd >= 0).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("options", ONE_OF_EACH, ids=str)
def test_gradient_rows_sum_to_zero(options, direction, impl) -> None:
    student, teacher, labels = make(4, 1000)
    options = with_tensors(options, 4)
    upstream = torch.ones(4), torch.ones(4)
    _, _, gradient = value_and_gradient(
        softmax_kl, student, teacher, labels, upstream, direction=direction, impl=impl, **options
    )
    assert gradient.abs().sum(1).min() > 0.01
    assert gradient.double().sum(1).abs().max() < 5e-6


@pytest.mark.parametrize("impl", VARIANTS[:-1], indirect=True)  # the reference in float32 is not made for it
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("options", ONE_OF_EACH, ids=str)
def test_a_shift_of_the_logits_changes_nothing(options, direction, impl) -> None:
    student, teacher, labels = make(4, 1000)
    # Multiples of 2^-8, so that adding the offset is exact in float32.
    student, teacher = ((256 * x).round() / 256 for x in (student, teacher))
    options = with_tensors(options, 4) | {"direction": direction}
    want = truth(student, teacher, labels, **options)
    got = value_and_gradient(softmax_kl, student + 3000.0, teacher - 500.0, labels, impl=impl, **options)
    assert_close(got, want)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_tau_squared_is_in_value_and_gradient(direction, impl) -> None:
    """Logits and temperature times 3: the same distributions, so 9 times the value and 3 times the gradient."""
    student, teacher, _ = make(4, 1000)
    options = {"direction": direction, "impl": impl}
    kd, _, gradient = value_and_gradient(softmax_kl, student, teacher, None, **options)
    kd_3, _, gradient_3 = value_and_gradient(softmax_kl, 3 * student, 3 * teacher, None, temperature=3.0, **options)
    torch.testing.assert_close(kd_3, 9 * kd, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient_3, 3 * gradient, rtol=1e-4, atol=1e-7)


def test_backward_twice_with_different_gradients(impl) -> None:
    student, teacher, labels = make(4, 1000)
    student.requires_grad_()
    kd, label = softmax_kl(student, teacher, labels, temperature=2.0, impl=impl)
    (first,) = torch.autograd.grad(kd.sum(), student, retain_graph=True)
    (second,) = torch.autograd.grad(label.sum(), student, retain_graph=True)
    (both,) = torch.autograd.grad(2 * kd.sum() + 3 * label.sum(), student)
    torch.testing.assert_close(both, 2 * first + 3 * second, rtol=1e-5, atol=1e-7)
    assert (first - second).abs().max() > 0.1


def test_inputs_are_unchanged_and_nothing_is_stored_without_gradients() -> None:
    student, teacher, labels = make(4, 1000)
    copies = student.clone(), teacher.clone(), labels.clone()
    value_and_gradient(softmax_kl, student, teacher, labels, direction="reverse")
    assert all(torch.equal(a, b) for a, b in zip(copies, (student, teacher, labels), strict=True))
    with torch.no_grad():
        assert softmax_kl(student.requires_grad_(), teacher, labels)[0].grad_fn is None


def test_second_derivative_is_refused() -> None:
    student, teacher, _ = make(3, 7)
    student.requires_grad_()
    with pytest.raises(RuntimeError, match="softmax_kl can be differentiated once"):
        torch.autograd.grad(softmax_kl(student, teacher)[0].sum(), student, create_graph=True)
    (gradient,) = torch.autograd.grad(
        softmax_kl(student, teacher, impl="reference")[0].sum(), student, create_graph=True
    )
    gradient.square().sum().backward()
    assert student.grad.abs().max() > 1e-3


LOGITS = torch.zeros(3, 7)
LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LOGITS, LOGITS), {"impl": "cuda"}, "impl must be one of auto, triton, torch, reference, got 'cuda'"),
        ((LOGITS.double(), LOGITS), {"impl": "triton"}, "got torch.float64 on cpu; pass impl='auto'"),
        ((LOGITS, LOGITS), {"direction": "back"}, "direction must be one of forward, reverse, js, got 'back'"),
        ((LOGITS, LOGITS), {"beta": 0.3}, "beta goes with direction='js' alone, got 0.3 with direction='forward'"),
        ((LOGITS, LOGITS), {"direction": "js", "beta": 0.0}, r"beta must be a number in \(0, 1\), got 0.0; towards 0"),
        ((LOGITS, LOGITS), {"direction": "js", "beta": torch.ones(3)}, r"beta must be a number in \(0, 1\)"),
        ((LOGITS, LOGITS), {"mix": 1.1}, r"mix must be in \[0, 1\], got 1.1"),
        ((LOGITS, LOGITS), {"mix": math.nan}, r"mix must be in \[0, 1\], got nan"),
        (
            (LOGITS, LOGITS),
            {"mix": torch.tensor([0.0, -0.5, 1.0])},
            r"mix must be in \[0, 1\] in every row, got -0.5 to 1",
        ),
        ((LOGITS, LOGITS), {"mix": torch.ones(2)}, r"mix must be a float or a float32 tensor of shape \(3,\)"),
        ((LOGITS, LOGITS), {"mix": torch.ones(3, requires_grad=True)}, "mix requires a gradient"),
        ((LOGITS, None, LABELS), {"mix": 0.5}, "mix is the teacher's share of the target, but there is no teacher"),
        ((LOGITS, None), {}, "both None"),
        ((LOGITS[None], LOGITS), {}, r"student_logits_NV must be floating-point \[N, V\].*flatten"),
        ((LOGITS.long(), LOGITS), {}, "student_logits_NV must be floating-point"),
        ((LOGITS[:, :0], None, LABELS), {}, "at least one column"),
        ((LOGITS, LOGITS[:2]), {}, r"student's N = 3 rows, got torch.float32 of shape \(2, 7\)"),
        ((LOGITS, LOGITS[:, :5]), {}, "has 5 columns, but 7 take part; pass valid_columns=5"),
        ((LOGITS, LOGITS[:, :5]), {"valid_columns": 6}, "has 5 columns, but 6 take part"),
        ((LOGITS, LOGITS), {"valid_columns": 8}, r"valid_columns must be in \[1, 7\].*got 8"),
        ((LOGITS, LOGITS), {"valid_columns": 0}, r"valid_columns must be in \[1, 7\].*got 0"),
        ((LOGITS, LOGITS.clone().requires_grad_()), {}, "detach it"),
        ((LOGITS, LOGITS.to("meta")), {}, "is on meta, the student's logits on cpu"),
        ((LOGITS, LOGITS, LABELS.to("meta")), {}, "labels_N is on meta, the student's logits on cpu"),
        ((LOGITS, LOGITS), {"temperature": torch.ones(3, device="meta")}, "temperature is on meta"),
        ((LOGITS, LOGITS, LABELS[:2]), {}, r"labels_N must be int64 of shape \(3,\)"),
        ((LOGITS, LOGITS, LABELS.int()), {}, "got torch.int32"),
        ((LOGITS, LOGITS, LABELS + 7), {}, r"labels_N must be in \[0, 7\) or ignore_index = -100, got 7 and 2 more"),
        ((LOGITS, LOGITS, LABELS + 5), {"valid_columns": 5}, r"in \[0, 5\)"),
        ((LOGITS, LOGITS, LABELS - 1), {}, "got -1"),
        ((LOGITS, LOGITS), {"temperature": 0.0}, "^temperature must be positive and finite, got 0.0"),
        ((LOGITS, LOGITS), {"temperature": math.nan}, "got nan"),
        ((LOGITS, LOGITS), {"teacher_temperature": -1.0}, "^teacher_temperature must be positive and finite, got -1.0"),
        ((LOGITS, LOGITS), {"temperature": torch.ones(2)}, r"float32 tensor of shape \(3,\)"),
        ((LOGITS, LOGITS), {"temperature": torch.ones(3).double()}, "got torch.float64"),
        ((LOGITS, LOGITS), {"temperature": torch.tensor([1.0, 0.0, 2.0])}, "in every row, got 0.0 to 2.0"),
        ((LOGITS, LOGITS), {"temperature": torch.ones(3, requires_grad=True)}, "temperature requires a gradient"),
    ],
)
def test_errors_name_what_is_wrong(arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        softmax_kl(*arguments, **options)
