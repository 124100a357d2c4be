"""Divergences between a teacher's and a student's distribution, per row: one home for all methods.

All take raw logits [N, V] of any float dtype, compute in float32 and return float32 [N] in nats. Gradients reach the student
only. Equal logits give exactly zero. Where it says so, tau^2 is inside, in value and in gradient (Hinton et al. 2015), so that
the term's weight need not change with the temperature.

Shape letters: N rows, V columns. p_T and p_S are the softmax of the logits over tau.
"""

import torch
from torch import Tensor

from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.kernels.softmax_kl_reference import js_scale


def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(p_T || p_S), by the kernel."""
    return softmax_kl(student_logits_NV, teacher_logits_NV.detach(), temperature=temperature)[0]


def reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(p_S || p_T), by the kernel."""
    return softmax_kl(student_logits_NV, teacher_logits_NV.detach(), temperature=temperature, direction="reverse")[0]


def jeffreys(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """tau^2 (KL(p_T || p_S) + KL(p_S || p_T)), without a half."""
    pair = student_logits_NV, teacher_logits_NV
    return forward_kl(*pair, temperature=temperature) + reverse_kl(*pair, temperature=temperature)


def jensen_shannon(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """tau^2 (beta KL(p_T || m) + (1 - beta) KL(p_S || m)) with m = beta p_T + (1 - beta) p_S, by the kernel.

    The plain form, without the kernel's scale c(beta) (`js_scale`): it and its gradient vanish towards both ends of beta.

    Args:
        beta: the teacher's share of m, in (0, 1); 0.5 is the Jensen-Shannon divergence, at most log 2.

    Source: generalised Jensen-Shannon as in GKD (Agarwal et al. 2023, arXiv 2306.13649, section 2).
    """
    scaled = softmax_kl(
        student_logits_NV, teacher_logits_NV.detach(), temperature=temperature, direction="js", beta=beta
    )[0]
    return scaled / js_scale(beta)


def skew_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, alpha: float, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(p_T || alpha p_T + (1 - alpha) p_S).

    Args:
        alpha: the teacher's share of what it is compared with, in (0, 1); DistiLLM takes 0.1.

    Source: DistiLLM (Ko et al. 2024, arXiv 2402.03898), equation 4.
    """
    _require_share("alpha", alpha)
    log_s, log_t = _log_probs(student_logits_NV, teacher_logits_NV, temperature)
    return -(temperature**2) * (log_t.exp() * _log_mix(1 - alpha, log_s - log_t)).sum(-1)


def total_variation(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Half the sum of |p_T - p_S|, in [0, 1]; no tau^2."""
    log_s, log_t = _log_probs(student_logits_NV, teacher_logits_NV, temperature)
    return 0.5 * (log_s.exp() - log_t.exp()).abs().sum(-1)


def entropy(logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Of the softmax of the logits over tau, in [0, log V]; no tau^2."""
    log_p = torch.log_softmax(logits_NV.float() / temperature, -1)
    return -(log_p.exp() * log_p).sum(-1)


def _log_probs(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    both = (student_logits_NV, teacher_logits_NV.detach())
    log_s, log_t = (torch.log_softmax(logits.float() / temperature, -1) for logits in both)
    return log_s, log_t


def _log_mix(share: float, log_ratio: Tensor) -> Tensor:
    """log((1 - share) + share exp(log_ratio)): exactly 0 at 0, finite in value and gradient however far the ratio is."""
    below = torch.log1p(share * torch.expm1(log_ratio.clamp(max=0)))
    above = log_ratio + torch.log1p((1 - share) * torch.expm1(-log_ratio.clamp(min=0)))
    return torch.where(log_ratio <= 0, below, above)


def _require_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{name} must be in (0, 1), got {share}; at its ends the divergence is 0 or a KL")
