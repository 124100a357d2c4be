"""Temperature KL or Jensen-Shannon divergence between teacher and student, and label cross-entropy, per row from raw logits.

    p = softmax(teacher_logits / tau_t)    q = softmax(student_logits / tau_s)    m = beta p + (1 - beta) q
    forward:  kd = tau_s * tau_t * sum_j p_j (log p_j - log q_j)     d kd / d student_logits = tau_t (q - p)
    reverse:  kd = tau_s * tau_t * sum_j q_j (log q_j - log p_j)     d kd / d student_logits = tau_t q (log(q / p) - KL)
    js:       kd = tau_s * tau_t * c (beta sum_j p_j log(p_j / m_j) + (1 - beta) sum_j q_j log(q_j / m_j))
              d kd / d student_logits = (tau_t / beta) q (log(q / m) - sum_j q_j log(q_j / m_j))
    label = -log softmax(student_logits)[label]                      d label / d student_logits = softmax - onehot

With `mix`, (1 - mix) * student_logits + mix * teacher_logits stand in the place of teacher_logits, the student's held constant.

The factor tau^2 keeps the size of the KD gradient independent of the temperature, and c = 1 / (beta (1 - beta)) keeps it
independent of beta: for models near each other js is the KL to second order whatever beta is, towards 0 it becomes forward,
towards 1 reverse. Without c it is beta times the one there and 1 - beta times the other, and nothing is learnt at the ends.

Logits are read twice, once for eight statistics of each row and once for the gradient; nothing of size N x V is stored but the
gradient itself. What reads them:

    impl          file                    for
    "triton"      softmax_kl_triton.py    GPUs (its head lists the kernels by V)
    "torch"       softmax_kl_native.py    CPUs with a C compiler: float32, bfloat16 and float16
                  softmax_kl_torch.py     everything else
    "reference"   softmax_kl_reference.py the definition, differentiable any number of times

"auto" is triton for logits on a GPU, except float64, and torch elsewhere.

Shape letters: N rows (supervised tokens or images), V classes or vocabulary; N1 is a column, one number a row.

Sources: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2; we differ in
that the KL includes the teacher's entropy, so that equal models give zero. js: Agarwal et al. (GKD, arXiv 2306.13649, section
2), who have no c. mix: Shing et al. (TAID, arXiv 2501.16937), whose code mixes logits, as here.
"""

from collections.abc import Callable
from typing import Any

import torch

from kd_core.kernels import softmax_kl_native, softmax_kl_torch, softmax_kl_triton
from kd_core.kernels.softmax_kl_arguments import check_call, check_row_weight, plain_weights
from kd_core.kernels.softmax_kl_reference import softmax_kl_reference
from kd_core.kernels.softmax_kl_torch import Options, Rows

# ---------------------------------------------------------------------------------------------------------------------
# Autograd. Each pass is a plain function, which eager mode calls as it is: an operator of torch.library would cost the
# host more than the launches of the kernels. torch.compile gets the same functions as operators that it does not look into
# ---------------------------------------------------------------------------------------------------------------------


def make_options(
    student: torch.Tensor,
    student_tau_N: torch.Tensor | None,
    teacher_tau_N: torch.Tensor | None,
    mix_N: torch.Tensor | None,
    student_tau: float,
    teacher_tau: float,
    mix: float,
    direction: str,
    beta: float,
    ignore_index: int,
    columns: int,
) -> Options:
    dtype = _dtype(student)
    rows = lambda given_N, number: number if given_N is None else given_N.to(dtype).contiguous()
    return Options(
        rows(student_tau_N, student_tau),
        rows(teacher_tau_N, teacher_tau),
        rows(mix_N, None if mix == 1.0 else mix),
        direction,
        beta,
        ignore_index,
        columns,
    )


def _taking_part(logits_NV: torch.Tensor | None, columns: int) -> torch.Tensor | None:
    return None if logits_NV is None else logits_NV[:, :columns]


def _empty_gradient(student_NV: torch.Tensor, columns: int) -> torch.Tensor:
    """[N, V]; zero beyond the columns that take part."""
    grad_NV = torch.empty(student_NV.shape, dtype=student_NV.dtype, device=student_NV.device)
    if columns < student_NV.shape[1]:
        grad_NV[:, columns:] = 0.0
    return grad_NV


def statistics_of_part(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    options: Options,
    impl: str,
) -> torch.Tensor:
    """The statistics [8, N] of these columns, for rows that have more of them elsewhere."""
    given = student[:, : options.columns], _taking_part(teacher, options.columns), labels, options
    if impl == "triton":
        return softmax_kl_triton.statistics(*given, of_part=True)[2]
    return torch.stack(_backend(*given[:2]).statistics(*given, of_part=True))


def add_mixture(student: torch.Tensor, teacher: torch.Tensor, stats: torch.Tensor, options: Options, impl: str) -> None:
    """Fills in what js has of the mixture in these columns, as a summand of the row's."""
    given = student[:, : options.columns], teacher[:, : options.columns]
    if impl == "triton":
        softmax_kl_triton.mixture(*given, stats, options)
    else:
        _backend(*given).mixture(*given, Rows(*stats.unbind()), options)


def _backend(student: torch.Tensor, teacher: torch.Tensor | None) -> Any:
    return softmax_kl_native if softmax_kl_native.supports(student, teacher) else softmax_kl_torch


def _softmax_kl(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    student_tau_N: torch.Tensor | None,
    teacher_tau_N: torch.Tensor | None,
    mix_N: torch.Tensor | None,
    student_tau: float,
    teacher_tau: float,
    mix: float,
    direction: str,
    beta: float,
    ignore_index: int,
    columns: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """kd_N, label_N, and the statistics [8, N] that the gradient needs (`Rows`)."""
    options = make_options(
        student, student_tau_N, teacher_tau_N, mix_N, student_tau, teacher_tau, mix, direction, beta, ignore_index, columns
    )  # fmt: skip
    student, teacher = student[:, :columns], _taking_part(teacher, columns)
    if impl == "triton":
        return softmax_kl_triton.statistics(student, teacher, labels, options)
    stats = _backend(student, teacher).statistics(student, teacher, labels, options)
    kd_N, label_N = softmax_kl_torch.values(stats, labels, teacher is not None, options)
    return kd_N, label_N, torch.stack(stats)


def _softmax_kl_fake(student: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kd_N, label_N = (student.new_empty(student.shape[0], dtype=_dtype(student)) for _ in range(2))
    return kd_N, label_N, student.new_empty((len(Rows._fields), student.shape[0]), dtype=_dtype(student))


def _softmax_kl_gradient(
    kd_upstream: torch.Tensor | None,
    label_upstream: torch.Tensor | None,
    stats: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    student_tau_N: torch.Tensor | None,
    teacher_tau_N: torch.Tensor | None,
    mix_N: torch.Tensor | None,
    student_tau: float,
    teacher_tau: float,
    mix: float,
    direction: str,
    beta: float,
    ignore_index: int,
    columns: int,
    impl: str,
) -> torch.Tensor:
    options = make_options(
        student, student_tau_N, teacher_tau_N, mix_N, student_tau, teacher_tau, mix, direction, beta, ignore_index, columns
    )  # fmt: skip
    grad_NV = _empty_gradient(student, columns)
    student, teacher, out = student[:, :columns], _taking_part(teacher, columns), grad_NV[:, :columns]
    if impl == "triton":
        kd, label = (0.0 if given is None else given for given in (kd_upstream, label_upstream))
        softmax_kl_triton.gradient(student, teacher, labels, stats, options, kd, label, out)
        return grad_NV
    upstream = [torch.zeros_like(stats[0]) if given is None else given for given in (kd_upstream, label_upstream)]
    _backend(student, teacher).gradient(student, teacher, labels, Rows(*stats.unbind()), options, *upstream, out)
    return grad_NV


def _softmax_kl_gradient_fake(
    kd_upstream: Any, label_upstream: Any, stats: Any, student: torch.Tensor, *_: Any
) -> torch.Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], *inputs[:6])
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(False)


def _backward(gradient: Callable[..., torch.Tensor]) -> Callable[..., tuple[Any, ...]]:
    def backward(
        ctx: Any, kd_upstream: torch.Tensor | None, label_upstream: torch.Tensor | None, _: None
    ) -> tuple[Any, ...]:
        # torch.autograd.function.once_differentiable lets a second derivative pass as zero where the upstream gradient
        # is a constant, as that of a sum is.
        if torch.is_grad_enabled():
            raise RuntimeError("softmax_kl can be differentiated once; for create_graph=True pass impl='reference'")
        return gradient(kd_upstream, label_upstream, *ctx.saved_tensors, *ctx.rest), *[None] * 13

    return backward


class _SoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        output = _softmax_kl(*args)
        _save(ctx, args, output)  # a setup_context of its own costs an inspect.signature at every call
        return output

    backward = staticmethod(_backward(_softmax_kl_gradient))


_gradient_operator = torch.library.custom_op("kd_core::softmax_kl_gradient", _softmax_kl_gradient, mutates_args=())
_gradient_operator.register_fake(_softmax_kl_gradient_fake)
_operator = torch.library.custom_op("kd_core::softmax_kl", _softmax_kl, mutates_args=())
_operator.register_fake(_softmax_kl_fake)
_operator.register_autograd(_backward(_gradient_operator), setup_context=_save)


def weighted_sum(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    options: Options,
    impl: str,
    row_weight_N: torch.Tensor | None,
    kd_weight: float,
    label_weight: float,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, kd_sum, label_sum; fills `out` [N, columns], where given, with the gradient of the loss."""
    student, teacher = student[:, : options.columns], _taking_part(teacher, options.columns)
    if impl == "triton":
        weights = row_weight_N, kd_weight, label_weight
        return softmax_kl_triton.weighted_sum(student, teacher, labels, options, *weights, out)
    ones_N = student.new_ones((), dtype=_dtype(student)).expand(len(student))
    weight_N = ones_N if row_weight_N is None else row_weight_N.to(ones_N.dtype)
    upstream = kd_weight * weight_N, label_weight * weight_N
    backend = _backend(student, teacher)
    if out is None:
        stats = backend.statistics(student, teacher, labels, options)
    else:
        stats = backend.statistics_and_gradient(student, teacher, labels, options, *upstream, out)
    values = softmax_kl_torch.values(stats, labels, teacher is not None, options)
    # A row of weight zero takes no part, whatever its value.
    kd_sum, label_sum = ((weight_N * value_N).masked_fill_(weight_N == 0, 0.0).sum() for value_N in values)
    return weighted_loss(kd_weight, kd_sum, label_weight, label_sum), kd_sum, label_sum


def weighted_loss(kd_weight: float, kd_sum: torch.Tensor, label_weight: float, label_sum: torch.Tensor) -> torch.Tensor:
    """The loss of two sums; a term of weight zero takes no part, whatever its value."""
    terms = (kd_weight, kd_sum), (label_weight, label_sum)
    return sum((weight * term for weight, term in terms if weight), torch.zeros_like(kd_sum))


def _softmax_kl_sum(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    student_tau_N: torch.Tensor | None,
    teacher_tau_N: torch.Tensor | None,
    mix_N: torch.Tensor | None,
    student_tau: float,
    teacher_tau: float,
    mix: float,
    direction: str,
    beta: float,
    ignore_index: int,
    columns: int,
    impl: str,
    row_weight_N: torch.Tensor | None,
    kd_weight: float,
    label_weight: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, kd_sum, label_sum, and the gradient of the loss, [N, V], or [0] where none is asked for."""
    options = make_options(
        student, student_tau_N, teacher_tau_N, mix_N, student_tau, teacher_tau, mix, direction, beta, ignore_index, columns
    )  # fmt: skip
    grad_NV = _empty_gradient(student, columns) if with_gradient else student.new_empty(0)
    out = grad_NV[:, :columns] if with_gradient else None
    weights = row_weight_N, kd_weight, label_weight
    return *weighted_sum(student, teacher, labels, options, impl, *weights, out), grad_NV


def _softmax_kl_sum_fake(
    student: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, kd_sum, label_sum = (student.new_empty((), dtype=_dtype(student)) for _ in range(3))
    shape = student.shape if rest[-1] else (0,)
    return loss, kd_sum, label_sum, torch.empty(shape, dtype=student.dtype, device=student.device)


def scale_(grad: torch.Tensor, upstream: torch.Tensor) -> None:
    """grad *= upstream, a scalar that the host does not read on a GPU; nothing is touched where it is 1."""
    if grad.is_cuda and grad.dtype != torch.float64:
        softmax_kl_triton.scale_(grad, upstream)
    elif grad.is_cuda or upstream.item() != 1.0:
        grad.mul_(upstream)


def save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Keeps the gradients output[3:] of the loss output[0] in the first inputs."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[: len(output) - 3]]
    ctx.num_inputs, ctx.handed_over = len(inputs), False
    ctx.set_materialize_grads(False)


def backward_sum(scale_: Callable[..., None], name: str, instead: str) -> Callable[..., tuple[Any, ...]]:
    """The backward pass of what `save_sum` kept; `instead` is what to do for a second one."""

    def backward(ctx: Any, upstream: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name} can be differentiated once; for create_graph=True pass impl='reference'")
        if ctx.handed_over:
            raise RuntimeError(f"{name} keeps its gradient for one backward pass; for retain_graph=True {instead}")
        ctx.handed_over = True
        gradients: list[torch.Tensor | None] = []
        for grad, needed, dtype in zip(ctx.saved_tensors, ctx.needs_input_grad, ctx.dtypes, strict=False):
            if needed:
                scale_(grad, upstream)
            gradients.append(grad.to(dtype) if needed else None)
        return *gradients, *[None] * (ctx.num_inputs - len(gradients))

    return backward


class _SoftmaxKLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        output = _softmax_kl_sum(*args)
        save_sum(ctx, args, output)
        return output

    backward = staticmethod(backward_sum(scale_, "softmax_kl_sum", "use softmax_kl"))


scale_operator = torch.library.custom_op("kd_core::scale_", scale_, mutates_args={"grad"})
_sum_operator = torch.library.custom_op("kd_core::softmax_kl_sum", _softmax_kl_sum, mutates_args=())
_sum_operator.register_fake(_softmax_kl_sum_fake)
_sum_operator.register_autograd(
    backward_sum(scale_operator, "softmax_kl_sum", "use softmax_kl"), setup_context=save_sum
)


def _dtype(student: torch.Tensor) -> torch.dtype:
    """What the operators compute in and return: float64 for float64 logits where no kernel serves them."""
    return softmax_kl_torch.compute_dtype(student)


# ---------------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------------


def _reference(student: Any, teacher: Any, labels: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = make_options(student, *rest[:-1])
    kd_N, label_N = softmax_kl_reference(
        student,
        teacher,
        labels,
        temperature=options.student_tau,
        teacher_temperature=options.teacher_tau,
        direction=options.direction,
        beta=options.beta,
        mix=options.mix,
        ignore_index=options.ignore_index,
        valid_columns=options.columns,
        dtype=torch.promote_types(student.dtype, torch.float32),
    )
    return kd_N.float(), label_N.float()


def softmax_kl(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    teacher_temperature: float | torch.Tensor | None = None,
    direction: str = "forward",
    beta: float | None = None,
    mix: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    valid_columns: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row, tau_s * tau_t times the divergence of teacher and student, and the cross-entropy of the label at temperature 1.

    Differentiable in the student's logits, once (any number of times with impl="reference"). Weights, masks and the
    division by a token count are the caller's, on [N] vectors; their gradient is applied in float32. Kept for the backward
    pass: the logits themselves, and eight floats a row.

    A term of probability zero is zero, also where both logits are -inf. A column that the teacher allows and the student
    excludes by -inf makes the value inf with a finite gradient (reverse: the roles are swapped and the row's gradient is
    zero; js: finite in value and gradient). A mix excludes what either side does, but at its ends, where one side alone
    counts. A row that is -inf throughout, on either side, has value and gradient zero. NaN stays NaN, but a row whose
    upstream gradients are both zero has gradient zero whatever its logits.

    In float32 the value is exact to about 1e-7 tau^2 nats and the gradient to about 1e-6 of its size, for logits up to
    1e9 tau, at every beta. torch.compile compiles anew for each number given as `temperature` or `mix`; give one that changes
    as a tensor.

    Args:
        student_logits_NV: float [N, V], any float dtype, which is the gradient's too; rows may be strided.
        teacher_logits_NV: float [N, at least the columns that take part], any float dtype; None for labels alone.
        labels_N: int64 [N], in [0, columns that take part) or ignore_index; None for the KD term alone.
        temperature: tau > 0, dimensionless; divides both sides' logits. A float, or float32 [N].
        teacher_temperature: the teacher's own tau, where it differs.
        direction: "forward" for KL(teacher || student), "reverse" for KL(student || teacher), "js" for the Jensen-Shannon
            divergence with its scale c(beta) = 1 / (beta (1 - beta)).
        beta: of js alone, the teacher's share of the mixture of probabilities, in (0, 1); default 0.5.
        mix: the teacher's share of the target's logits, in [0, 1], a float or float32 [N]; None for the teacher's own.
        ignore_index: label of rows without a label term; they keep their KD term.
        valid_columns: columns from here on take part in nothing, on either side; default all of the student's.
        impl: "triton", "torch", "reference" (plain and slow, float32 or wider), or "auto" for the fastest on the device.

    Returns:
        kd_N: float32 [N], nats, never negative, exactly zero for equal logits; zeros without a teacher.
        label_N: float32 [N], nats; zero where the label is ignore_index; zeros without labels.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, the teacher's logits require a gradient, or
            there is neither a teacher nor labels. Values of temperatures and labels are checked on a CPU only, and not
            under torch.compile; elsewhere a label out of range makes its row's loss NaN.
    """
    args = check_call(
        student_logits_NV, teacher_logits_NV, labels_N, temperature, teacher_temperature, direction, beta, mix,
        ignore_index, valid_columns, impl,
    )  # fmt: skip
    if impl == "reference":
        return _reference(*args)
    kd_N, label_N, _ = (_operator if torch.compiler.is_compiling() else _SoftmaxKL.apply)(*args)
    return kd_N.float(), label_N.float()


def softmax_kl_sum(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None = None,
    *,
    kd_weight: float = 1.0,
    label_weight: float = 0.0,
    row_weight_N: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    teacher_temperature: float | torch.Tensor | None = None,
    direction: str = "forward",
    beta: float | None = None,
    mix: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    valid_columns: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of `softmax_kl` over rows, for weights that are known in advance.

    loss = kd_weight * kd_sum + label_weight * label_sum, of which kd_sum = sum_n row_weight_n kd_n, and label_sum alike.
    The gradient is made in the forward pass, so the logits can be freed before the backward pass, which only multiplies by
    the upstream gradient, on the device, where that is not 1. One backward pass: for retain_graph=True use `softmax_kl`.

    Args:
        kd_weight, label_weight: factors of the two terms.
        row_weight_N: float32 [N], without a gradient; a row of weight 0 takes no part, whatever its logits. Default 1.

    The other arguments are those of `softmax_kl`.

    Returns:
        loss: float32, a scalar, differentiable in the student's logits, once.
        kd_sum, label_sum: float32, scalars, detached; without kd_weight and label_weight.

    Raises:
        ValueError: as `softmax_kl`; or float16 logits that require a gradient, most of whose elements would underflow
            before a loss scale reaches them.
    """
    args = check_call(
        student_logits_NV, teacher_logits_NV, labels_N, temperature, teacher_temperature, direction, beta, mix,
        ignore_index, valid_columns, impl,
    )  # fmt: skip
    student = student_logits_NV
    check_row_weight(row_weight_N, student)
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    if with_gradient and student.dtype == torch.float16 and impl != "reference":
        raise ValueError(
            "student_logits_NV is float16, whose gradient would underflow here; use softmax_kl, or bfloat16"
        )
    if impl == "reference":
        weight_N = torch.ones_like(args[0][:, 0], dtype=torch.float32) if row_weight_N is None else row_weight_N
        # A row of weight zero takes no part, whatever its logits.
        logits = (None if given is None else given.masked_fill(weight_N[:, None] == 0, 0.0) for given in args[:2])
        kd_sum, label_sum = ((weight_N * value_N).sum() for value_N in _reference(*logits, *args[2:]))
        loss = weighted_loss(kd_weight, kd_sum, label_weight, label_sum)
    else:
        weights = row_weight_N, *plain_weights(kd_weight, label_weight)
        function = _sum_operator if torch.compiler.is_compiling() else _SoftmaxKLSum.apply
        loss, kd_sum, label_sum, _ = function(*args, *weights, with_gradient)
    return loss.float(), kd_sum.detach().float(), label_sum.detach().float()
