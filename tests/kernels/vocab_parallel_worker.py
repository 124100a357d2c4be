"""One rank of test_vocab_parallel.py: compares its columns with the whole, in float64; exits with 1 on a difference."""

import datetime
import itertools
import math
import sys

import torch
import torch.distributed as dist

from kd_core.kernels.softmax_kl import softmax_kl_reference
from kd_core.kernels.vocab_parallel import softmax_kl_vocab_parallel

EDGES = 0, 1, 9, 13  # columns of each rank: uneven, one of them alone


def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 6, 13, dtype=torch.float64)
    student[1, :9] = teacher[1, :9] = -math.inf  # all that two ranks have
    teacher[2, 11:] = -math.inf
    student[3] += 3000.0
    return student, teacher, torch.tensor([0, 12, -100, 9, 4, 10])


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    first, last = EDGES[dist.get_rank() :][:2]
    student, teacher, labels = make()
    taus = torch.linspace(0.5, 4.0, 6)
    upstream = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64), torch.linspace(1.0, 3.0, 6, dtype=torch.float64)
    shares = torch.linspace(0.0, 1.0, 6)
    for direction, (tau, teacher_tau), valid, with_labels, with_teacher in itertools.product(
        ("forward", "reverse", "js"),
        ((1.0, 1.0), (2.0, 3.3), (taus, taus)),
        (None, 11, 4),
        (True, False),
        (True, False),
    ):
        if not (with_labels or with_teacher) or (direction == "reverse" and valid is None):
            continue  # reverse is infinite where the teacher excludes a column; softmax_kl's own tests cover that
        options = {
            "temperature": tau,
            "teacher_temperature": teacher_tau,
            "direction": direction,
            "valid_columns": valid,
            "mix": shares if with_teacher and tau is taus else None,
        } | ({"beta": 0.9} if direction == "js" else {})
        given = labels.where(labels < (valid or 13), -100) if with_labels else None
        results = []
        for columns, function, extra in (
            (slice(None), softmax_kl_reference, {}),
            (slice(first, last), softmax_kl_vocab_parallel, {"first_column": first, "impl": sys.argv[1]}),
        ):
            part = student[:, columns].clone().requires_grad_()
            others = teacher[:, columns] if with_teacher else None, given
            values = function(part, *others, **options, **extra)
            loss = sum(
                (value * up).where(value.isfinite(), 0.0).sum() for value, up in zip(values, upstream, strict=True)
            )
            (gradient,) = torch.autograd.grad(loss, part)
            results.append((*values, gradient))
        (kd, label, gradient), (kd_here, label_here, gradient_here) = results
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(kd_here, kd, **close)
        torch.testing.assert_close(label_here, label, **close)
        torch.testing.assert_close(gradient_here, gradient[:, first:last], **close)
    wrong = torch.tensor([13, 2, 2, 2, 2, 2])
    _, label_here = softmax_kl_vocab_parallel(student[:, first:last], None, wrong, first_column=first, impl=sys.argv[1])
    assert label_here.isnan().tolist() == [True] + [False] * 5, label_here
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
