"""What softmax_kl, its sums and linear_softmax_kl are called with: checked, and put into the operators' order.

Values of tensors are looked at on a CPU alone, and not under torch.compile: elsewhere that would make the host wait.
"""

import math
from typing import Any

import torch
import triton

DIRECTIONS = ("forward", "reverse", "js")
IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")


def readable(tensor: torch.Tensor) -> bool:
    """Whether looking at values costs neither waiting for a GPU nor a graph of torch.compile."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_device(name: str, given: torch.Tensor, student: torch.Tensor) -> None:
    if given.device != student.device:
        raise ValueError(f"{name} is on {given.device}, the student's logits on {student.device}")


def _check_vector(name: str, given: torch.Tensor, student: torch.Tensor) -> None:
    num_rows = student.shape[0]
    if given.shape != (num_rows,) or given.dtype != torch.float32:
        raise ValueError(
            f"{name} must be a float or a float32 tensor of shape ({num_rows},), one per row, "
            f"got {given.dtype} of shape {tuple(given.shape)}"
        )
    _check_device(name, given, student)
    if given.requires_grad:
        raise ValueError(f"{name} requires a gradient, but is not differentiated here; detach it")


def _check_temperature(name: str, tau: float | torch.Tensor, student: torch.Tensor) -> None:
    if not isinstance(tau, torch.Tensor):
        if not 0.0 < tau < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {tau}")
        return
    _check_vector(name, tau, student)
    if readable(tau) and not ((tau > 0) & (tau < math.inf)).all():
        raise ValueError(f"{name} must be positive and finite in every row, got {tau.min()} to {tau.max()}")


def _check_mix(mix: float | torch.Tensor, teacher: torch.Tensor | None, student: torch.Tensor) -> None:
    if teacher is None:
        raise ValueError(f"mix is the teacher's share of the target, but there is no teacher, got {mix}; leave it out")
    if isinstance(mix, torch.Tensor):
        _check_vector("mix", mix, student)
        if readable(mix) and not ((mix >= 0) & (mix <= 1)).all():
            raise ValueError(f"mix must be in [0, 1] in every row, got {mix.min()} to {mix.max()}")
    elif not 0.0 <= mix <= 1.0:
        raise ValueError(f"mix must be in [0, 1], got {mix}")


def _checked_beta(beta: float | None, direction: str) -> float:
    if direction != "js":
        if beta is not None:
            raise ValueError(
                f"beta goes with direction='js' alone, got {beta} with direction={direction!r}; leave it out"
            )
        return 0.5  # not used
    if beta is None:
        return 0.5
    if not isinstance(beta, int | float) or not 0 < beta < 1:
        raise ValueError(
            f"beta must be a number in (0, 1), got {beta}; towards 0 js becomes direction='forward', towards 1 'reverse'"
        )
    return float(beta)


def _check_logits(student: torch.Tensor, teacher: torch.Tensor | None, valid_columns: int | None) -> None:
    if student.ndim != 2 or not student.is_floating_point():
        raise ValueError(
            f"student_logits_NV must be floating-point [N, V], got {student.dtype} of shape {tuple(student.shape)}; "
            "flatten batch and time first"
        )
    if valid_columns is not None and not 1 <= valid_columns <= student.shape[1]:
        raise ValueError(
            f"valid_columns must be in [1, {student.shape[1]}], the student's columns, got {valid_columns}"
        )
    if student.shape[1] == 0:
        raise ValueError(f"student_logits_NV must have at least one column, got shape {tuple(student.shape)}")
    if teacher is None:
        return
    columns = student.shape[1] if valid_columns is None else valid_columns
    if teacher.ndim != 2 or not teacher.is_floating_point() or teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"teacher_logits_NV must be floating-point [N, V] with the student's N = {student.shape[0]} rows, "
            f"got {teacher.dtype} of shape {tuple(teacher.shape)}"
        )
    if teacher.shape[1] < columns:
        raise ValueError(
            f"teacher_logits_NV has {teacher.shape[1]} columns, but {columns} take part; "
            f"pass valid_columns={teacher.shape[1]} if the student's further columns are padding"
        )
    _check_device("teacher_logits_NV", teacher, student)
    if teacher.requires_grad:
        raise ValueError(
            "teacher_logits_NV requires a gradient, but only the student is differentiated; "
            "detach it, or run the teacher under torch.no_grad()"
        )


def _check_labels(labels: torch.Tensor, student: torch.Tensor, columns: int, ignore_index: int) -> None:
    num_rows = student.shape[0]
    if labels.shape != (num_rows,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels_N must be int64 of shape ({num_rows},), one per row of logits, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    _check_device("labels_N", labels, student)
    if readable(labels):
        wrong = labels[((labels < 0) | (labels >= columns)) & (labels != ignore_index)]
        if len(wrong) > 0:
            raise ValueError(
                f"labels_N must be in [0, {columns}) or ignore_index = {ignore_index}, "
                f"got {wrong[0].item()} and {len(wrong) - 1} more outside"
            )


def check_row_weight(row_weight_N: torch.Tensor | None, student: torch.Tensor) -> None:
    if row_weight_N is None:
        return
    if row_weight_N.shape != student.shape[:1] or row_weight_N.dtype != torch.float32 or row_weight_N.requires_grad:
        raise ValueError(
            f"row_weight_N must be float32 of shape ({len(student)},) without a gradient, "
            f"got {row_weight_N.dtype} of shape {tuple(row_weight_N.shape)}"
        )
    _check_device("row_weight_N", row_weight_N, student)


def plain_weights(kd_weight: float | torch.Tensor, label_weight: float | torch.Tensor) -> tuple[float, float]:
    """The two as numbers; ValueError for a tensor whose gradient would be lost."""
    for name, weight in (("kd_weight", kd_weight), ("label_weight", label_weight)):
        if isinstance(weight, torch.Tensor) and weight.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which this does not make; detach it, or pass impl='reference'"
            )
    return float(kd_weight), float(label_weight)


def check_call(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    temperature: float | torch.Tensor,
    teacher_temperature: float | torch.Tensor | None,
    direction: str,
    beta: float | None,
    mix: float | torch.Tensor | None,
    ignore_index: int,
    valid_columns: int | None,
    impl: str,
) -> tuple[Any, ...]:
    """The operators' arguments that follow from a call's; raises ValueError for what is wrong with it."""
    _check_logits(student_logits_NV, teacher_logits_NV, valid_columns)
    columns = student_logits_NV.shape[1] if valid_columns is None else valid_columns
    options = check_options(
        student_logits_NV, teacher_logits_NV, labels_N, temperature, teacher_temperature, direction, beta, mix,
        ignore_index, columns, impl,
    )  # fmt: skip
    return student_logits_NV, teacher_logits_NV, labels_N, *options


def check_options(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels_N: torch.Tensor | None,
    temperature: float | torch.Tensor,
    teacher_temperature: float | torch.Tensor | None,
    direction: str,
    beta: float | None,
    mix: float | torch.Tensor | None,
    ignore_index: int,
    columns: int,
    impl: str,
) -> tuple[Any, ...]:
    """What the operators take after the labels; student and teacher may be any tensors [N, ...] of the models."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if teacher is None and labels_N is None:
        raise ValueError("the teacher and labels_N are both None, so there is nothing to compute; give one of them")
    if teacher_temperature is None:
        teacher_temperature = temperature
    beta = _checked_beta(beta, direction)
    if mix is not None:
        _check_mix(mix, teacher, student)
    _check_temperature("temperature", temperature, student)
    _check_temperature("teacher_temperature", teacher_temperature, student)
    if labels_N is not None:
        _check_labels(labels_N, student, columns, ignore_index)
    if impl == "auto":
        impl = "triton" if student.is_cuda and _triton_serves(student, teacher) else "torch"
    elif impl == "triton" and not _triton_serves(student, teacher):
        raise ValueError(
            f"impl='triton' computes in float32 on a GPU, got {student.dtype} on {student.device}; pass impl='auto'"
        )
    if teacher is None:
        temperature = teacher_temperature = 1.0  # the label term's: one exponential does
    given = temperature, teacher_temperature, 1.0 if mix is None else mix
    tensors = (one if isinstance(one, torch.Tensor) else None for one in given)
    floats = (1.0 if isinstance(one, torch.Tensor) else float(one) for one in given)
    return *tensors, *floats, direction, beta, ignore_index, columns, impl


def _triton_serves(*logits: torch.Tensor | None) -> bool:
    on_device = [tensor.is_cuda or triton.knobs.runtime.interpret for tensor in logits if tensor is not None]
    return all(on_device) and all(tensor.dtype != torch.float64 for tensor in logits if tensor is not None)
