"""The definition of softmax_kl, in plain PyTorch and differentiated by autograd."""

import math

import torch


def js_scale(beta: float) -> float:
    """c(beta) of direction="js": its second-order term is that of the KL at every beta, and its limits are the two KLs.

    For p = q (1 + e) with a small e, beta KL(p || m) + (1 - beta) KL(q || m) = beta (1 - beta) KL(p || q) to second order,
    so without a scale value and gradient vanish towards both ends.
    """
    return 1.0 / (beta * (1.0 - beta))


def _mixed(student: torch.Tensor, teacher: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
    """Logits of the target; a side whose share is zero is not looked at, and rounding moves no logit that both have."""
    share = torch.as_tensor(share, dtype=student.dtype, device=student.device)
    mixed = torch.where(student == teacher, student, (1 - share) * student + share * teacher)
    return torch.where(share == 0, student, torch.where(share == 1, teacher, mixed))


def softmax_kl_reference(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    labels_N: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    teacher_temperature: float | torch.Tensor | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    mix: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    valid_columns: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax_kl` in plain PyTorch, computed and returned in `dtype`; arguments are not checked.

    In float64 it is the truth that every implementation is tested against.
    """
    columns = student_logits_NV.shape[1] if valid_columns is None else valid_columns
    if teacher_temperature is None:
        teacher_temperature = temperature
    student_tau, teacher_tau, share = (
        given.to(dtype)[:, None] if isinstance(given, torch.Tensor) else given
        for given in (temperature, teacher_temperature, 1.0 if mix is None else mix)
    )
    student = student_logits_NV[:, :columns].to(dtype)
    student_empty_N1 = (student == -math.inf).all(dim=1, keepdim=True)
    student = student.masked_fill(student_empty_N1, 0.0)
    kd_N = label_N = student.new_zeros(student.shape[0])

    if teacher_logits_NV is not None:
        teacher = _mixed(student.detach(), teacher_logits_NV[:, :columns].to(dtype), share)
        teacher_empty_N1 = (teacher == -math.inf).all(dim=1, keepdim=True)
        log_p = torch.log_softmax(teacher.masked_fill(teacher_empty_N1, 0.0) / teacher_tau, dim=1)
        log_q = torch.log_softmax(student / student_tau, dim=1)
        if direction == "forward":
            p = log_p.exp()
            kl_NV = p * torch.where(p == 0, 0.0, log_p - log_q)
        elif direction == "js":
            p, q = log_p.exp(), log_q.exp()
            m = q + beta * (p - q)
            m = torch.where(m == 0, 1.0, m)
            of_teacher, of_student = (x * torch.where(x == 0, 1.0, x / m).log() for x in (p, q))
            kl_NV = js_scale(beta) * (beta * of_teacher + (1 - beta) * of_student)
        else:
            # Where the teacher excludes what the student allows, the KL is infinite and has no derivative: zero by
            # convention.
            infinite_N1 = ((log_p == -math.inf) & (log_q.exp() > 0)).any(dim=1, keepdim=True)
            log_q = torch.where(infinite_N1, log_q.detach(), log_q)
            q = log_q.exp()
            kl_NV = q * torch.where(q == 0, 0.0, log_q - log_p)
        kl_N1 = kl_NV.sum(dim=1, keepdim=True)
        # Rounding may leave a value just below zero; this lifts the value and keeps the gradient.
        kl_N1 = torch.where(kl_N1 < 0, kl_N1 - kl_N1.detach(), kl_N1)
        kl_N1 = kl_N1.masked_fill(student_empty_N1 | teacher_empty_N1, 0.0)
        kd_N = (student_tau * teacher_tau * kl_N1).squeeze(1)

    if labels_N is not None:
        ignored_N = (labels_N == ignore_index) | student_empty_N1.squeeze(1)
        index_N1 = labels_N.masked_fill(ignored_N, 0)[:, None]
        label_N = -torch.log_softmax(student, dim=1).gather(1, index_N1).squeeze(1)
        label_N = label_N.masked_fill(ignored_N, 0.0)
    return kd_N, label_N
