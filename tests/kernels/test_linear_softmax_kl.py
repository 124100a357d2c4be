"""linear_softmax_kl against the unfused float64 graph: values, gradients, options, and what it does not compute or hold."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kd_core.kernels import linear_softmax_kl as module
from kd_core.kernels import softmax_kl_native
from kd_core.kernels.linear_softmax_kl import LinearSoftmaxKL, linear_softmax_kl
from kd_core.kernels.softmax_kl import softmax_kl_reference

N, D, E, V = 29, 12, 20, 203
WEIGHTS = {"kd_weight": 0.7, "label_weight": 0.3}
NAMES = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")
STUDENT = NAMES[:3]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=["native", "torch", "reference"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(softmax_kl_native, "supports", lambda *_: False)
    elif request.param == "native" and softmax_kl_native.library() is None:
        pytest.skip("no C compiler here")
    return "torch" if request.param == "native" else request.param


def make(teacher_columns: int = V, seed: int = 0) -> Tensors:
    """Logits of a standard deviation of about 2 on both sides, and labels, every third of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, D), (V, D), (V,), (N, E), (teacher_columns, E), (teacher_columns,))
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in zip(NAMES, shapes, strict=True)}
    tensors["student_weight"] *= 2 / math.sqrt(D)
    tensors["teacher_weight"] *= 2 / math.sqrt(E)
    tensors["labels"] = torch.randint(V, (N,), generator=generator)
    tensors["labels"][1::3] = -100
    return tensors


def logits_of(hidden: Any, weight: Any, bias: Any, scale: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    logits = scale * (hidden @ weight.t() + bias)
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def truth(tensors: Tensors, upstream: float = 1.0, **options: Any) -> tuple[list[torch.Tensor], Tensors]:
    """loss, kd_sum and label_sum of the unfused graph in float64, and the gradients of the student's tensors."""
    leaves = {name: tensors[name].detach().double().requires_grad_() for name in STUDENT}
    sides = [
        [options.pop(f"{side}_{what}", default) for what, default in (("logit_scale", 1.0), ("softcap", None))]
        for side in ("student", "teacher")
    ]
    student = logits_of(*leaves.values(), *sides[0])
    teacher = logits_of(*(tensors[name].double() for name in NAMES[3:]), *sides[1])
    weight = options.pop("row_weight_N", torch.ones(N)).double()
    kd_weight, label_weight = options.pop("kd_weight", 1.0), options.pop("label_weight", 0.0)
    kd, label = softmax_kl_reference(student, teacher, tensors["labels"], **options)
    kd_sum, label_sum = ((weight * value)[weight != 0].sum() for value in (kd, label))
    loss = kd_weight * kd_sum + label_weight * label_sum
    gradients = torch.autograd.grad(upstream * loss, list(leaves.values()))
    return [loss.detach(), kd_sum.detach(), label_sum.detach()], dict(zip(leaves, gradients, strict=True))


def call(tensors: Tensors, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    biases = {f"{side}_bias_V": tensors.get(f"{side}_bias") for side in ("student", "teacher")}
    positional = (
        tensors.get(name) for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    )
    return linear_softmax_kl(*positional, tensors["labels"], **biases, **options)


def run(
    tensors: Tensors, upstream: float = 1.0, needed: tuple[str, ...] = STUDENT, **options: Any
) -> tuple[list[torch.Tensor], Tensors]:
    leaves = {name: tensors[name].detach().requires_grad_(name in needed) for name in STUDENT}
    loss, kd_sum, label_sum = call(tensors | leaves, **options)
    assert not kd_sum.requires_grad and not label_sum.requires_grad
    (upstream * loss).backward()
    values = [loss.detach(), kd_sum, label_sum]
    assert all(value.dtype == torch.float32 and value.shape == () for value in values)
    return values, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_close(got: Any, want: Any, value_rtol: float = 1e-6, gradient_rtol: float = 1e-5) -> None:
    for value, expected in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=value_rtol, atol=1e-6)
    assert got[1].keys() == want[1].keys()
    for name, expected in want[1].items():
        error = (got[1][name].double() - expected).norm() / expected.norm()
        assert error <= gradient_rtol, f"{name}: {error}"


PER_ROW = torch.linspace(0.7, 3.0, N)
ROW_WEIGHT = torch.linspace(-1.0, 2.0, N).masked_fill(torch.arange(N) % 5 == 0, 0.0)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 2.0},
    {"temperature": PER_ROW, "teacher_temperature": 1.5},
    {"direction": "reverse", "temperature": 3.3},
    {"row_weight_N": ROW_WEIGHT},
    {"student_logit_scale": 0.3, "teacher_logit_scale": 1.7},
    {"student_softcap": 1.5, "teacher_softcap": 3.0},
    {"student_softcap": 2.0, "student_logit_scale": 1.3, "direction": "reverse", "temperature": 2.0},
    {"ignore_index": 5},
    {"direction": "js", "beta": 0.9, "mix": PER_ROW / 3, "temperature": 2.0, "row_weight_N": ROW_WEIGHT},
    {"mix": 0.4, "student_softcap": 2.0},
)


@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options) or "defaults")
def test_value_and_gradients_equal_the_unfused_float64_graph(options, upstream, impl) -> None:
    tensors = make()
    if "ignore_index" in options:
        tensors["labels"] = tensors["labels"].masked_fill(tensors["labels"] == -100, 5)
    want = truth(tensors, upstream, **options, **WEIGHTS)
    assert_close(run(tensors, upstream, impl=impl, chunk_rows=8, **options, **WEIGHTS), want)


@pytest.mark.parametrize("chunk_rows", [1, 7, N, N + 100, None])
def test_chunks_change_nothing(chunk_rows) -> None:
    tensors = make()
    assert_close(run(tensors, chunk_rows=chunk_rows, **WEIGHTS), truth(tensors, **WEIGHTS))


@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (7, [5, 5]), (10, [10]), (99, [10])])
def test_chunks_are_equal(most, sizes) -> None:
    assert [index.stop - index.start for index in module._chunks(10, most, None)] == sizes
    rows = torch.arange(0, 20, 2)
    assert torch.equal(torch.cat(list(module._chunks(20, most, rows))), rows)
    assert list(module._chunks(0, most, None)) == []


def test_the_default_chunk_fits_its_memory(monkeypatch) -> None:
    seen = rows_computed(monkeypatch)
    # Logits of both sides and a gradient, 4 bytes each.
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 10 * V * 12 + 5)
    run(make())
    assert seen == [10, 10, 9]


def test_float64_is_exact(impl) -> None:
    tensors = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in make().items()}
    options = {"student_softcap": 3.0, "temperature": 2.0}
    # Values are returned in float32; autograd of the reference passes through that, and the weights with it.
    exact = 1e-7 if impl == "reference" else 1e-12
    for weights in (WEIGHTS, WEIGHTS | {"row_weight_N": ROW_WEIGHT}):
        got, want = run(tensors, impl=impl, chunk_rows=8, **options, **weights), truth(tensors, **options, **weights)
        assert_close(got, want, 1e-6, exact)


@pytest.mark.parametrize("options", [{}, {"rows_M": torch.arange(N)}], ids=["found", "named"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_row_of_weight_zero_takes_no_part_whatever_it_holds(softcap, options, impl) -> None:
    tensors, shared = make(), {"row_weight_N": ROW_WEIGHT, "student_softcap": softcap, **WEIGHTS}
    want = truth(tensors, **shared)
    for side in ("student", "teacher"):
        tensors[f"{side}_hidden"][0] = math.nan
    assert_close(run(tensors, impl=impl, **shared, **options), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_have_exactly_zero_kl(dtype) -> None:
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in make().items()}
    tensors |= {name.replace("student", "teacher"): tensors[name] for name in STUDENT}
    (loss, kd_sum, _), gradients = run(tensors, temperature=2.0)
    assert loss == kd_sum == 0
    assert all(gradient.abs().max() <= 1e-6 for gradient in gradients.values())


def test_the_gradient_is_that_of_the_value() -> None:
    """Along a random direction of all inputs, by central differences in float64."""
    tensors = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in make().items()}
    options = {"temperature": 2.0, "student_softcap": 3.0, "student_logit_scale": 0.7}
    _, gradients = run(tensors, **options, **WEIGHTS)
    torch.manual_seed(1)
    step = {name: 1e-5 * torch.randn_like(tensors[name]) for name in STUDENT}
    moved = [tensors | {name: tensors[name] + sign * step[name] for name in STUDENT} for sign in (1, -1)]
    ends = [truth(there, **options, **WEIGHTS)[0][0] for there in moved]
    slope = sum((gradients[name] * step[name]).sum() for name in STUDENT)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_16_bits(dtype) -> None:
    """The student's matrices are multiplied as float32; the teacher's logits are rounded to its dtype."""
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in make().items()}
    rounded = tensors | {name: tensors[name].float() for name in NAMES[3:]}
    if dtype == torch.float16:
        with torch.no_grad():
            values = call(rounded, **WEIGHTS)
        torch.testing.assert_close(values[0].double(), truth(rounded, **WEIGHTS)[0][0], rtol=1e-6, atol=0)
    else:
        got = run(rounded, **WEIGHTS)
        assert all(gradient.dtype == dtype for gradient in got[1].values())
        assert_close(got, truth(rounded, **WEIGHTS), gradient_rtol=2.5e-3)  # half a unit in the last place
        assert_close(run(tensors, **WEIGHTS), truth(rounded, **WEIGHTS), 2e-3, 1e-2)


def test_vocabularies_of_different_sizes(impl) -> None:
    """Whatever is beyond the columns that take part, it changes nothing and gets no gradient."""
    tensors = make(teacher_columns=V + 13)
    tensors["labels"].clamp_(max=149)
    cut = {name: tensors[name][:150] if name.endswith(("weight", "bias")) else tensors[name] for name in tensors}
    for name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias"):
        tensors[name][150:] = math.nan
    got = run(tensors, valid_columns=150, impl=impl, chunk_rows=8, **WEIGHTS)
    want = truth(cut, **WEIGHTS)
    for name in ("student_weight", "student_bias"):
        assert (got[1][name][150:] == 0).all()
        got[1][name] = got[1][name][:150]
    assert_close(got, want)


@pytest.mark.parametrize("valid_columns", [None, 150])
def test_labels_alone(valid_columns, impl) -> None:
    tensors = make()
    tensors["labels"].clamp_(max=149)
    student_only = {name: tensors[name] for name in (*STUDENT, "labels")}
    got = run(student_only, impl=impl, chunk_rows=8, kd_weight=0.9, label_weight=2.0, valid_columns=valid_columns)
    want = truth(tensors, kd_weight=0.0, label_weight=2.0, valid_columns=valid_columns)
    want[0][1].zero_()
    assert_close(got, want)


@pytest.mark.parametrize("needed", [(), STUDENT[:1], STUDENT[1:2], STUDENT[2:], STUDENT[:2], STUDENT])
def test_nothing_is_computed_for_what_needs_no_gradient(needed, monkeypatch) -> None:
    """Two matmuls a chunk for the logits, one more for each matrix that needs a gradient."""
    products = []
    matmul_ = module._matmul_
    monkeypatch.setattr(module, "_matmul_", lambda *args, **kwargs: products.append(0) or matmul_(*args, **kwargs))
    tensors = make()
    loss, *_ = call(tensors | {name: tensors[name].detach().requires_grad_() for name in needed}, **WEIGHTS)
    assert loss.requires_grad == bool(needed)
    assert len(products) == 2 + len([name for name in needed if name != "student_bias"])
    if needed:
        _, gradients = run(tensors, needed=needed, **WEIGHTS)
        assert gradients.keys() == set(needed)
        assert_close(([], gradients), ([], {name: truth(tensors, **WEIGHTS)[1][name] for name in needed}))
    with torch.no_grad():
        products.clear()
        assert not call(tensors | {"student_weight": tensors["student_weight"].requires_grad_()})[0].requires_grad
    assert len(products) == 2


def rows_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    weighted_sum = module.softmax_kl.weighted_sum
    spy: Callable[..., Any] = lambda *args: seen.append(len(args[0])) or weighted_sum(*args)
    monkeypatch.setattr(module.softmax_kl, "weighted_sum", spy)
    return seen


def test_rows_that_contribute_nothing_are_left_out(monkeypatch) -> None:
    """Also where they hold what would spoil the others; an ignored row keeps its KD term, so it is one of these only
    without a teacher."""
    seen, tensors = rows_computed(monkeypatch), make()
    want = truth(tensors, row_weight_N=ROW_WEIGHT, **WEIGHTS)
    tensors["student_hidden"][ROW_WEIGHT == 0] = math.nan
    got = run(tensors, row_weight_N=ROW_WEIGHT, **WEIGHTS)
    assert_close(got, want)
    assert (got[1]["student_hidden"][ROW_WEIGHT == 0] == 0).all()
    assert seen == [int((ROW_WEIGHT != 0).sum())]
    student_only = {name: tensors[name] for name in (*STUDENT, "labels")}
    run(student_only, label_weight=1.0, row_weight_N=ROW_WEIGHT)
    run(student_only, label_weight=1.0)
    labelled = tensors["labels"] != -100
    assert seen[1:] == [int((labelled & (ROW_WEIGHT != 0)).sum()), int(labelled.sum())]
    run(tensors, row_weight_N=torch.zeros(N))
    assert len(seen) == 3


@pytest.mark.parametrize("row_weight", [None, ROW_WEIGHT])
def test_rows_of_the_callers_choice(row_weight, impl, monkeypatch) -> None:
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:11]
    weight = torch.zeros(N).index_copy(0, rows, (torch.ones(N) if row_weight is None else row_weight)[rows])
    tensors, tau = make(), PER_ROW
    seen = rows_computed(monkeypatch)
    options = {"temperature": tau, **WEIGHTS}
    got = run(tensors, rows_M=rows, row_weight_N=row_weight, impl=impl, chunk_rows=4, **options)
    assert_close(got, truth(tensors, row_weight_N=weight, **options))
    assert seen == ([] if impl == "reference" else [4, 4, 3])


def test_no_rows(impl) -> None:
    tensors = make()
    for empty in ({"rows_M": torch.empty(0, dtype=torch.int64)}, {"row_weight_N": torch.zeros(N)}):
        values, gradients = run(tensors, impl=impl, **empty, **WEIGHTS)
        assert values == [0.0, 0.0, 0.0] and all((gradient == 0).all() for gradient in gradients.values())
    none = tensors | {name: tensors[name][:0] for name in ("student_hidden", "teacher_hidden", "labels")}
    values, gradients = run(none, impl=impl, **WEIGHTS)
    assert values == [0.0, 0.0, 0.0] and gradients["student_hidden"].shape == (0, D)


def test_tied_embeddings() -> None:
    """The weight is an embedding's too: its gradients of both uses are summed."""
    tensors = make()
    tokens = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    gradients = []
    for function in (call, unfused):
        weight = tensors["student_weight"].detach().requires_grad_()
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        loss, *_ = function(tensors | {"student_hidden": hidden, "student_weight": weight}, **WEIGHTS)
        loss.backward()
        gradients.append(weight.grad)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def unfused(tensors: Tensors, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return call(tensors, impl="reference", **options)


def test_strided_inputs() -> None:
    tensors = make()
    want = truth(tensors, **WEIGHTS)
    for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"):
        tensors[name] = torch.stack((tensors[name], tensors[name]), dim=1)[:, 1].t().contiguous().t()
        assert not tensors[name].is_contiguous()
    assert_close(run(tensors, chunk_rows=8, **WEIGHTS), want)


def test_inputs_are_left_as_they_are() -> None:
    tensors = make()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    run(tensors, student_softcap=2.0, teacher_softcap=2.0, **WEIGHTS)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_second_backward_and_second_derivative_are_refused() -> None:
    tensors = make()
    leaf = tensors["student_hidden"].requires_grad_()
    loss, *_ = call(tensors)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for retain_graph=True pass impl='reference'"):
        loss.backward()
    loss, *_ = call(tensors)
    with pytest.raises(RuntimeError, match="linear_softmax_kl can be differentiated once"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    loss, *_ = call(tensors, impl="reference")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), leaf)[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype) -> None:
    """Parameters of float32 and activations of 16 bits meet, as they do in a linear layer; sums are not rounded."""
    tensors = make()
    tensors["student_hidden"] = tensors["student_hidden"].to(dtype)
    rounded = {
        name: tensor.bfloat16().float() if name.endswith(("hidden", "weight")) else tensor
        for name, tensor in tensors.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        got = run(tensors, **WEIGHTS)
    assert {name: gradient.dtype for name, gradient in got[1].items()} == {
        name: tensors[name].dtype for name in STUDENT
    }
    assert_close(got, truth(rounded, **WEIGHTS), 2e-3, 1e-2)


def test_one_graph_of_torch_compile() -> None:
    tensors = make()

    def step(hidden, weight, bias):
        student = {"student_hidden": hidden.tanh(), "student_weight": weight, "student_bias": bias}
        loss, kd_sum, label_sum = call(tensors | student, row_weight_N=ROW_WEIGHT, temperature=2.0, **WEIGHTS)
        return loss / 13 + 0 * (kd_sum + label_sum)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        for _ in range(2):  # the second call of the compiled one comes from its cache
            leaves = [tensors[name].detach().requires_grad_() for name in STUDENT]
            loss = function(*leaves)
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))


def test_the_operator_is_registered_correctly() -> None:
    tensors = make()
    student = [tensors[name].requires_grad_() for name in STUDENT]
    teacher = [tensors[name] for name in NAMES[3:]]
    arguments = (
        *student, 1.0, None, *teacher, 1.0, None, tensors["labels"], None, None, None, 2.0, 2.0, 0.5, "js", 0.3, -100, 150, "torch",
        None, 0.7, 0.3, None, 8, True, True, True,
    )  # fmt: skip
    tensors["labels"].clamp_(max=149)
    # Without the check of traced outputs: the gradients are for the backward pass alone, which works in place.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._operator, arguments, test_utils=tests)


def test_the_head_as_a_module() -> None:
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(D, V), torch.nn.Linear(E, V).requires_grad_(False)
    hidden, teacher_hidden, labels = torch.randn(N, D), torch.randn(N, E), make()["labels"]
    logits, teacher_logits = student(hidden), teacher(teacher_hidden)
    names = list(student.state_dict())
    student.__class__ = LinearSoftmaxKL
    assert list(student.state_dict()) == names and torch.equal(student(hidden), logits)
    options = {"teacher_bias_V": teacher.bias, "temperature": 2.0, **WEIGHTS}
    student(hidden, teacher_hidden, teacher.weight, labels, **options)[0].backward()
    got = student.weight.grad, student.bias.grad
    student.zero_grad()
    module.softmax_kl.softmax_kl_sum(logits, teacher_logits, labels, temperature=2.0, **WEIGHTS)[0].backward()
    torch.testing.assert_close(got, (student.weight.grad, student.bias.grad), rtol=1e-5, atol=1e-5)


HIDDEN, WEIGHT = torch.randn(3, 4), torch.randn(7, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((HIDDEN[0], WEIGHT, HIDDEN, WEIGHT), {}, r"student_hidden must be floating-point \[N, width\]"),
        ((HIDDEN, WEIGHT[:, :3], HIDDEN, WEIGHT), {}, r"student_weight must be \[V, 4\], .*gathered first"),
        ((HIDDEN, torch.empty(0), HIDDEN, WEIGHT), {}, r"got shape \(0,\); a sharded weight has to be gathered"),
        ((HIDDEN.bfloat16(), WEIGHT, HIDDEN, WEIGHT), {}, "student_weight is torch.float32 on cpu, student_hidden torch.bf"),
        ((HIDDEN, WEIGHT, HIDDEN[:2], WEIGHT), {}, "teacher_hidden_NE must have the student's 3 rows"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT[:5]), {}, "5 rows, but 7 columns take part; pass valid_columns=5"),
        ((HIDDEN, WEIGHT, HIDDEN, None), {}, "must be given both, or be None both"),
        ((HIDDEN, WEIGHT, None, None), {}, "both None"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT.clone().requires_grad_()), {}, "freeze the teacher, or detach"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"valid_columns": 8}, r"valid_columns must be in \[1, 7\]"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"student_bias_V": torch.ones(3)}, r"student_bias_V must be of shape \(7,\)"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"teacher_softcap": 0.0}, "teacher_softcap must be positive"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"student_logit_scale": 0.0}, "student_logit_scale must be finite and not"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"chunk_rows": 0}, "chunk_rows must be at least 1"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"rows_M": torch.ones(3)}, r"rows_M must be int64 \[M\]"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"rows_M": torch.tensor([0, 2, 0])}, r"rows_M must be different rows in \[0, 3\)"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"rows_M": torch.tensor([3])}, r"rows_M must be different rows in \[0, 3\)"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"rows_M": torch.tensor([-1])}, r"rows_M must be different rows in \[0, 3\)"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"kd_weight": torch.ones((), requires_grad=True)}, "kd_weight requires a gradient"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"student_bias_V": torch.empty(0)}, "a sharded bias has to be gathered"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"row_weight_N": torch.ones(2)}, r"row_weight_N must be float32 of shape \(3,\)"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"temperature": 0.0}, "temperature must be positive"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"direction": "reverse", "beta": 0.5}, "beta goes with direction='js' alone"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"mix": torch.ones(2)}, r"mix must be a float or a float32 tensor of shape \(3,\)"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT), {"impl": "cuda"}, "impl must be one of"),
        ((HIDDEN, WEIGHT, HIDDEN, WEIGHT, torch.tensor([0, 7, 1])), {}, r"labels_N must be in \[0, 7\)"),
        ((HIDDEN.half().requires_grad_(), WEIGHT.half(), HIDDEN, WEIGHT), {}, "float16, in which the gradient"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        linear_softmax_kl(*arguments, **options)
