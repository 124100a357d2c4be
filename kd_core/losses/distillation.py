"""Losses beside the kernels' own. Shape letters: N rows, V vocabulary, B sequences, T positions."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kd_core.kernels.softmax_kl import softmax_kl, softmax_kl_sum
from kd_core.kernels.softmax_kl_reference import js_scale
from kd_core.losses.divergences import skew_kl, total_variation
from kd_core.losses.targets import mean_probabilities

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "total_variation", "mse"]
DIRECTIONS = {"forward_kl": "forward", "reverse_kl": "reverse"}  # the kernels' words for a KL
Ensemble = Literal["probabilities", "logits"]


def mean_teacher_logits(
    teacher_logits_NV: Sequence[Tensor], temperature: float, ensemble: Ensemble = "probabilities"
) -> Tensor:
    """Logits of one teacher that stands for several; one teacher is returned as it is.

    `probabilities`: `targets.mean_probabilities`, so that any divergence at that temperature sees their mean. `logits`: the mean of their
    logits, a normalised geometric mean of the probabilities, as in the code that the authors of arXiv 2211.00683
    released.

    Args:
        teacher_logits_NV: float [N, V] each, without padded columns, any float dtype; computed in float32.
        temperature: tau > 0, dimensionless; the one the divergence will divide by.

    Returns:
        [N, V], float32 for several teachers.
    """
    if len(teacher_logits_NV) == 1:
        return teacher_logits_NV[0]
    if ensemble == "logits":
        return functools.reduce(torch.add, (logits_NV.float() for logits_NV in teacher_logits_NV)) / len(
            teacher_logits_NV
        )
    return mean_probabilities(teacher_logits_NV, temperature=temperature)


def kernel_form(divergence: Divergence, beta: float) -> tuple[dict[str, Any], float] | None:
    """What has the kernels compute a divergence, and how many times its value they give; None where they lack it."""
    if divergence == "jensen_shannon":
        return {"direction": "js", "beta": beta}, js_scale(beta)
    return ({"direction": DIRECTIONS[divergence]}, 1.0) if divergence in DIRECTIONS else None


def distillation_sum(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor | None,
    labels_N: Tensor | None = None,
    *,
    divergence: Divergence,
    kd_weight: float,
    label_weight: float = 0.0,
    row_weight_N: Tensor | None = None,
    temperature: float,
    beta: float = 0.5,
    valid_columns: int | None = None,
    sequence_length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_kl_sum` for every divergence, and for a softmax over positions.

    `mse` is the mean over columns of the squared difference of raw logits; it has no temperature.

    Args:
        beta: the teacher's share of the mixture, of jensen_shannon and skew_kl (there called alpha).
        sequence_length: T, where the teacher term's softmax runs over the T positions of a sequence, for each column by
            itself. Then rows are the B T positions, and for each supervised row the term counts the sum over the columns
            of a sequence: its mean over supervised rows is the mean over sequences of that sum.

    Returns:
        loss, kd_sum, label_sum, as `softmax_kl_sum`.

    Source: composer pull request 1819, by the authors of arXiv 2211.00683: the mean squared error gives good results
        too, and the softmax over the tokens of a sequence, found by accident, better ones for masked language models.
    """
    shared: dict[str, Any] = dict(label_weight=label_weight, row_weight_N=row_weight_N, valid_columns=valid_columns)
    if teacher_logits_NV is None:
        return softmax_kl_sum(student_logits_NV, None, labels_N, **shared)
    form = kernel_form(divergence, beta)
    if form and sequence_length is None:
        options, times = form
        loss, kd_sum, label_sum = softmax_kl_sum(
            student_logits_NV, teacher_logits_NV, labels_N, kd_weight=kd_weight / times, temperature=temperature,
            **options, **shared,
        )  # fmt: skip
        return loss, kd_sum / times, label_sum
    student_NV, teacher_NV = (logits[:, :valid_columns].float() for logits in (student_logits_NV, teacher_logits_NV))
    loss = label_sum = student_NV.new_zeros(())
    if labels_N is not None:
        loss, _, label_sum = softmax_kl_sum(student_logits_NV, None, labels_N, **shared)
    if row_weight_N is None:
        row_weight_N = student_NV.new_ones(len(student_NV))
    if sequence_length is None:
        kd_sum = (row_weight_N * _rows(student_NV, teacher_NV, divergence, temperature, beta)).sum()
    else:
        student_T, teacher_T = (
            logits.unflatten(0, (-1, sequence_length)).transpose(1, 2).flatten(0, 1)
            for logits in (student_NV, teacher_NV)
        )
        rows_of_a_sequence = row_weight_N.sum() * sequence_length / len(row_weight_N)
        kd_sum = (
            softmax_kl(student_T, teacher_T, temperature=temperature, direction=DIRECTIONS[divergence])[0].sum()
            * rows_of_a_sequence
        )
    return loss + kd_weight * kd_sum, kd_sum.detach(), label_sum


def _rows(student_NV: Tensor, teacher_NV: Tensor, divergence: Divergence, temperature: float, beta: float) -> Tensor:
    """float32 [N], what the kernels lack."""
    if divergence == "skew_kl":
        return skew_kl(student_NV, teacher_NV, temperature=temperature, alpha=beta)
    if divergence == "total_variation":
        return total_variation(student_NV, teacher_NV, temperature=temperature)
    return (student_NV - teacher_NV).square().mean(-1)
