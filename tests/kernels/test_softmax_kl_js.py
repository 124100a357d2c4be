"""The Jensen-Shannon direction and the sliding target of softmax_kl: float64, properties, and what the ends of both are."""

import math

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpreterBuilder

from kd_core.kernels import softmax_kl as module
from kd_core.kernels import vocab_parallel
from kd_core.kernels.softmax_kl import softmax_kl, softmax_kl_reference, softmax_kl_sum
from kd_core.kernels.softmax_kl_arguments import DIRECTIONS
from kd_core.kernels.softmax_kl_reference import js_scale
from kd_core.kernels.softmax_kl_torch import Options, Rows, values
from tests.kernels.test_softmax_kl import VARIANTS, assert_close, impl, make, small_chunks, truth, value_and_gradient  # noqa: F401
from tests.kernels.test_softmax_kl_sum import WEIGHTS, run
from tests.kernels.test_softmax_kl_sum import assert_close as assert_sums_close
from tests.kernels.test_softmax_kl_sum import truth as truth_of_sums

INF = math.inf
PARTS = (slice(0, 8), 8), (slice(8, 19), 11)


def per_row(num_rows: int) -> torch.Tensor:
    """Shares of the teacher, both ends among them."""
    return torch.linspace(0.0, 1.0, num_rows)


# Integer temperatures share an exponential with the label term, other ones do not.
CASES = (
    ((1, 1), {"direction": "js", "beta": 0.1}),
    ((5, 7), {"direction": "js", "beta": 0.9, "temperature": "per row", "mix": "per row"}),
    ((5, 7), {"direction": "js", "beta": 0.001, "temperature": 4.0}),
    ((13, 1000), {"direction": "js", "beta": 0.999}),
    ((13, 1000), {"direction": "js", "temperature": 2.0, "mix": 0.3}),
    ((13, 1000), {"direction": "forward", "temperature": 4.0, "teacher_temperature": 1.5, "mix": "per row"}),
    ((13, 1000), {"direction": "reverse", "temperature": 2.0, "mix": 0.7}),
    ((4, 30522), {"direction": "js", "beta": 0.9, "mix": "per row"}),
    ((4, 30522), {"direction": "js", "beta": 0.1, "temperature": 3.3, "teacher_temperature": 2.0}),
    ((4, 30522), {"direction": "reverse", "mix": 0.5}),
)


@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_value_and_gradient_equal_float64(shape, options, impl) -> None:  # noqa: F811
    if impl == "triton" and shape[1] > 100:
        shape = (3, min(shape[1], 4099))  # the interpreter is slow
    student, teacher, labels = make(*shape)
    vectors = {"temperature": torch.linspace(0.7, 3.0, shape[0]), "mix": per_row(shape[0])}
    options = {name: vectors[name] if value == "per row" else value for name, value in options.items()}
    want = truth(student, teacher, labels, **options)
    got = value_and_gradient(softmax_kl, student, teacher, labels, impl=impl, **options)
    # The definition in float32 loses what the divisions by beta and 1 - beta enlarge; the implementations do not.
    rtol = 5e-3 if impl == "reference" else 3e-6
    assert_close(got, want, rtol, rtol)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("dtype", "teacher_dtype"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_a_mix_is_of_exact_logits(dtype, teacher_dtype, direction, impl) -> None:  # noqa: F811
    """In float32 whatever the logits' dtypes are, of a strided student, in columns that take part."""
    student, teacher, labels = make(6, 72)
    teacher = -teacher  # of opposite sign: the difference has more digits than either
    student, teacher = torch.stack((student, student), dim=1)[:, 0].to(dtype), teacher.to(teacher_dtype)
    options = {"direction": direction, "mix": per_row(6), "valid_columns": 70}
    labels.clamp_(max=69)
    want = truth(student, teacher, labels, **options)
    got = value_and_gradient(softmax_kl, student, teacher, labels, impl=impl, **options)
    # Triton's interpreter truncates to bfloat16 where hardware rounds.
    assert_close(got, want, (1.0 if impl == "triton" else 0.51) * torch.finfo(dtype).eps)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ends_of_the_mix(direction, impl) -> None:  # noqa: F811
    """At 1 the plain loss, whatever the student excludes; at 0 nothing to learn, whatever the teacher holds."""
    student, teacher, labels = make(2, 19)
    student[:, 7] = teacher[1, 7] = -INF
    options = {"direction": direction, "impl": impl}
    plain = value_and_gradient(softmax_kl, student, teacher, labels, **options)
    teacher[1, 3], teacher[1, 4] = math.nan, -INF
    mixed = value_and_gradient(softmax_kl, student, teacher, labels, mix=torch.tensor([1.0, 0.0]), **options)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(mixed, plain, strict=True))
    assert mixed[0][1] == 0 and mixed[2][1].abs().max() <= 1e-6  # its label is ignored


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_models_have_exactly_zero_with_a_mix(direction, impl) -> None:  # noqa: F811
    student = make(4, 1000)[0].to(torch.bfloat16)
    options = {"temperature": 3.3, "direction": direction, "impl": impl, "mix": 0.37}
    kd, _, gradient = value_and_gradient(softmax_kl, student, student.clone(), None, **options)
    assert (kd == 0).all() and gradient.abs().max() <= 1e-6


class TestExcluded:
    """Rows of four columns: what -inf means to the mixture of both sides, and to the mix of their logits."""

    upstream = torch.ones(1), torch.ones(1)

    def run(self, student, teacher, impl, **options):  # noqa: F811
        rows = torch.tensor([student]), torch.tensor([teacher])
        got = value_and_gradient(softmax_kl, *rows, None, self.upstream, impl=impl, **options)
        want = truth(*rows, None, self.upstream, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
        return got

    @pytest.mark.parametrize("beta", [0.1, 0.9])
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_js_stays_finite(self, side, beta, impl) -> None:  # noqa: F811
        rows = [[0.5, 1.0, -INF, 2.0], [1.5, 0.0, 1.0, 1.0]]
        student, teacher = rows if side == "student" else rows[::-1]
        kd, _, gradient = self.run(student, teacher, impl, direction="js", beta=beta, temperature=2.0)
        assert 0 < kd < INF and (gradient[0, 2] == 0) == (side == "student")

    def test_supports_without_a_common_column(self, impl) -> None:  # noqa: F811
        """The largest value: c times the entropy of beta; there is no slope."""
        kd, _, gradient = self.run([0.0, 0.0, -INF, -INF], [-INF, -INF, 0.0, 0.0], impl, direction="js", beta=0.3)
        entropy = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
        assert kd.item() == pytest.approx(js_scale(0.3) * entropy) and gradient.abs().max() <= 1e-6

    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("side", ["student", "teacher", "both"])
    def test_a_mix_excludes_what_either_does(self, side, direction, impl) -> None:  # noqa: F811
        """So a reverse KL is infinite where the teacher excludes what the student allows, however small its share."""
        student, teacher = [0.5, 1.0, 0.0, 2.0], [1.5, 0.0, 1.0, 1.0]
        for name, row in (("student", student), ("teacher", teacher)):
            if side in (name, "both"):
                row[2] = -INF
        kd, _, _ = self.run(student, teacher, impl, direction=direction, mix=0.25)
        assert (kd == INF) == (direction == "reverse" and side == "teacher")

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_not_a_number_is_not_hidden_by_a_mix(self, direction, impl) -> None:  # noqa: F811
        student, teacher = torch.tensor([[-INF, 1.0, 0.0, 2.0]]), torch.tensor([[math.nan, 0.0, 1.0, 1.0]])
        kd, _, gradient = value_and_gradient(
            softmax_kl, student, teacher, None, mix=0.5, direction=direction, impl=impl
        )
        assert kd.isnan() and gradient.isnan().any()


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_sums(beta, impl) -> None:  # noqa: F811
    """With the gradient made in the forward pass; a row of weight zero takes no part, whatever it holds."""
    student, teacher, labels = make(5, 1003)
    row_weight = torch.linspace(-1.0, 2.0, 5)
    row_weight[3] = 0.0
    options = {"direction": "js", "beta": beta, "mix": per_row(5), "temperature": 2.0}
    want = truth_of_sums(student, teacher, labels, row_weight, **options)
    student[3, 7] = teacher[3, 9] = math.nan
    got = run(student, teacher, labels, row_weight_N=row_weight, upstream=0.5, impl=impl, **WEIGHTS, **options)
    assert_sums_close(got, (*want[:3], 0.5 * want[3]))


@pytest.mark.parametrize("impl", VARIANTS[:-1], indirect=True)
def test_columns_in_parts(impl) -> None:  # noqa: F811
    """What the vocabulary-parallel form asks of an implementation, without its ranks: the second part has a maximum."""
    student, teacher, _ = make(5, 19)
    student[:, 12] += 9.0
    options = Options(2.0, 2.0, 0.3, "js", 0.9, -100, 19)
    parts = [(student[:, part], teacher[:, part], options._replace(columns=size)) for part, size in PARTS]
    stats = [module.statistics_of_part(*sides, None, own, impl) for *sides, own in parts]
    rows = vocab_parallel._merge(Rows(*torch.stack(stats, dim=1)), options)
    of_mixture = torch.zeros(2, 5)
    for *sides, own in parts:
        whole = torch.stack(rows)
        module.add_mixture(*sides, whole, own, impl)
        of_mixture += whole[5::2]
    kd, _ = values(rows._replace(difference=of_mixture[0], teacher_difference=of_mixture[1]), None, True, options)
    want, _ = softmax_kl_reference(student.double(), teacher, temperature=2.0, direction="js", beta=0.9, mix=0.3)
    torch.testing.assert_close(kd.double(), want, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("impl", "function", "reads"),
    [
        ("resident", softmax_kl, {"forward": 2, "reverse": 2, "js": 2}),
        ("resident", softmax_kl_sum, {"forward": 1, "reverse": 1, "js": 1}),
        ("streaming", softmax_kl, {"forward": 2, "reverse": 2, "js": 3}),
        ("streaming", softmax_kl_sum, {"forward": 2, "reverse": 2, "js": 3}),
    ],
    indirect=["impl"],
)
def test_how_often_logits_are_read(function, reads, impl, monkeypatch) -> None:  # noqa: F811
    """With their gradient: elements of both sides that Triton's interpreter loads, in multiples of what there is."""
    student, teacher = (logits.bfloat16() for logits in make(3, 1000)[:2])
    loaded = []
    load = InterpreterBuilder.create_masked_load

    def counted(builder, pointers, mask, *rest):
        loaded.append(mask.data.sum() if pointers.get_element_ty() == triton.language.bfloat16 else 0)
        return load(builder, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    for direction, times in reads.items():
        loaded.clear()
        value_N = function(student.requires_grad_(), teacher, direction=direction, mix=0.3, impl=impl)[0]
        torch.autograd.grad(value_N.sum(), student)
        assert sum(loaded) == times * (student.numel() + teacher.numel()), direction


# ---------------------------------------------------------------------------------------------------------------------
# Properties of the definition
# ---------------------------------------------------------------------------------------------------------------------


def of(direction: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher, _ = (x.double() for x in make(5, 50))
    kd, _, gradient = value_and_gradient(
        softmax_kl_reference, student, teacher, None, (torch.ones(5), torch.ones(5)), direction=direction, **options
    )
    return kd, gradient


def test_the_scale_is_one_over_beta_times_its_rest() -> None:
    student, teacher, _ = (x.double() for x in make(5, 50))
    p, q = teacher.softmax(1), student.softmax(1)
    for beta in (0.1, 0.5, 0.8):
        m = beta * p + (1 - beta) * q
        plain = (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(1)
        torch.testing.assert_close(of("js", beta=beta)[0], plain / (beta * (1 - beta)))
        assert js_scale(beta) == pytest.approx(1 / (beta * (1 - beta)))


@pytest.mark.parametrize(("beta", "end"), [(1e-6, "forward"), (1 - 1e-6, "reverse")])
def test_its_limits_are_the_two_kls(beta, end) -> None:
    """In value and gradient, so neither vanishes."""
    for got, want in zip(of("js", beta=beta), of(end), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9])
def test_near_models_have_the_kl_at_every_beta(beta) -> None:
    student = make(5, 50)[0].double()
    teacher = student + 1e-4 * torch.randn(5, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    js, kl = (
        value_and_gradient(softmax_kl_reference, student, teacher, None, direction=direction, beta=beta)
        for direction in ("js", "forward")
    )
    torch.testing.assert_close(js[0], kl[0], rtol=1e-3, atol=0)
    assert (js[2] - kl[2]).norm() <= 1e-3 * kl[2].norm()


def test_swapped_sides_swap_beta() -> None:
    student, teacher, _ = make(5, 50)
    kd, _ = softmax_kl(student, teacher, direction="js", beta=0.2)
    swapped, _ = softmax_kl(teacher, student, direction="js", beta=0.8)
    torch.testing.assert_close(kd, swapped)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_student_in_the_target_has_no_gradient(direction, impl) -> None:  # noqa: F811
    """As if the mixed logits had been made before, and given as the teacher's."""
    student, teacher, labels = make(5, 50)
    target = 0.7 * student + 0.3 * teacher
    want = value_and_gradient(softmax_kl, student, target, labels, direction=direction, impl=impl)
    got = value_and_gradient(softmax_kl, student, teacher, labels, direction=direction, mix=0.3, impl=impl)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_sums_take_what_rows_take() -> None:
    student, teacher, labels = make(5, 50)
    options = {"direction": "js", "beta": 0.2, "mix": 0.6}
    kd, _ = softmax_kl(student, teacher, labels, **options)
    torch.testing.assert_close(softmax_kl_sum(student, teacher, labels, **options)[1], kd.sum())
