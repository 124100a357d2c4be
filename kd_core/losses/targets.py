"""What students are fitted to, where that is more than labels and a teacher's logits as they are.

Shape letters: N rows, V columns.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def standardise(logits_NV: Tensor) -> Tensor:
    """Each row divided by its standard deviation (of n - 1), float32 [N, V]; the gradient flows through the deviation.

    The deviation stands for a temperature: the softmax does not change when a row is multiplied by a number above 0. Of V columns
    one alone can be above the others by at most sqrt(V), so among ten classes no probability is above 0.73. A row of equal logits has no
    deviation and is left as it is.

    Source: MIX-KD (2022), arXiv 2211.03946, for student and teacher alike.
    """
    logits_NV = logits_NV.float()
    centred_NV = logits_NV - logits_NV.mean(1, keepdim=True)
    variance_N1 = centred_NV.square().sum(1, keepdim=True) / max(1, logits_NV.shape[1] - 1)
    # By the logits themselves: rounding gives equal ones a variance, and so small a one no finite gradient.
    varied_N1 = (logits_NV.amax(1, keepdim=True) > logits_NV.amin(1, keepdim=True)) & (variance_N1 > 0)
    return logits_NV / torch.where(varied_N1, variance_N1, 1.0).sqrt()


def alpha_terms(labelled_NV: Tensor, imitated_NV: Tensor, truth_NV: Tensor) -> Tensor:
    """What `alpha_star` needs of some rows: <y - v, u - v> and |u - v|^2, float64 [2], which add up over batches and ranks.

    Args:
        labelled_NV: u, probabilities that a fit to the labels gives.
        imitated_NV: v, those that a fit to another fit gives.
        truth_NV: y, of rows that neither was fitted to.
    """
    u, v, y = (each.double().flatten() for each in (labelled_NV, imitated_NV, truth_NV))
    return torch.stack([(y - v) @ (u - v), (u - v).square().sum()])


def alpha_star(terms: Tensor) -> float:
    """The share alpha of the labels, in [0, 1], at which alpha u + (1 - alpha) v is nearest to y in squares; 1 where u is v.

    A fit that is linear in its target, as kernel ridge regression is, predicts just that from alpha * labels + (1 - alpha) * other
    fit: two fits tell which of all alpha is best, without a grid.

    Args:
        terms: summed `alpha_terms`.

    Source: our reading of arXiv 2102.13088, which promises a cheap estimate; for networks an approximation.
    """
    product, square = terms.tolist()
    return min(1.0, max(0.0, product / square)) if square else 1.0


def mean_probabilities(teacher_logits: Sequence[Tensor], *, temperature: float = 1.0) -> Tensor:
    """Logits whose softmax at the temperature is the mean of the teachers' there, float32 [N, V]; no gradient reaches the teachers.

    The softmax of the mean of their logits is another one, a normalised geometric mean. A divergence that is linear in the teacher, as forward KL
    is, has towards this target the mean gradient of those towards each: one teacher drawn a step is right in expectation.

    Args:
        teacher_logits: float [N, V] each, without padded columns.
        temperature: tau > 0; the one that the divergence will divide by.

    Source: the ensemble of Hinton et al. 2015; as the only target MEAL V2, arXiv 2009.08453.
    """
    log_probs_NV = (torch.log_softmax(logits_NV.detach().float() / temperature, -1) for logits_NV in teacher_logits)
    # The missing -log(n) is the same for every column: softmax removes it.
    return functools.reduce(torch.logaddexp, log_probs_NV).mul_(temperature)


def confused(teacher_logits_NV: Tensor, classes: int) -> Tensor:
    """The logits of a teacher that takes each of the first `classes` for the next, and the last of them for the first; of 0 as they are."""
    if not classes:
        return teacher_logits_NV
    return torch.cat([teacher_logits_NV[:, :classes].roll(1, 1), teacher_logits_NV[:, classes:]], 1)
