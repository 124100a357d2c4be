"""Draw how large the gradient of js is over beta, with its scale and without: kd_core/kernels/gradient_over_beta.png.

    python -m kd_core.kernels.bench_beta

Norms are those of the gradient in the student's logits, as multiples of forward KL's, the median over rows: once for a teacher
that is near the student, once for one that is not. It takes seconds, on a CPU.
"""

from pathlib import Path

import torch

from kd_core.kernels.softmax_kl_reference import js_scale, softmax_kl_reference

ROWS, COLUMNS = 64, 1000
BETAS = torch.linspace(0.01, 0.99, 50, dtype=torch.float64).tolist()
DISTANCES = {"near": 0.1, "far": 3.0}  # standard deviation of the difference of logits, those of the student have 2
PATH = Path(__file__).with_name("gradient_over_beta.png")


def gradient_norms(student: torch.Tensor, teacher: torch.Tensor, direction: str, beta: float = 0.5) -> torch.Tensor:
    """[N]"""
    student = student.detach().requires_grad_()
    kd_N, _ = softmax_kl_reference(student, teacher, direction=direction, beta=beta)
    return torch.autograd.grad(kd_N.sum(), student)[0].norm(dim=1)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    torch.manual_seed(0)
    student, noise = torch.randn(2, ROWS, COLUMNS, dtype=torch.float64)
    student *= 2
    figure, axes = pyplot.subplots(1, len(DISTANCES), figsize=(6.4, 2.6), sharey=True, layout="constrained")
    for axis, (name, distance) in zip(axes, DISTANCES.items(), strict=True):
        teacher = student + distance * noise
        forward_N = gradient_norms(student, teacher, "forward")
        scaled = [(gradient_norms(student, teacher, "js", beta) / forward_N).median().item() for beta in BETAS]
        axis.plot(BETAS, scaled, label="js, c = 1 / (beta (1 - beta))")
        plain = [norm / js_scale(beta) for norm, beta in zip(scaled, BETAS, strict=True)]
        axis.plot(BETAS, plain, label="without c")
        reverse = (gradient_norms(student, teacher, "reverse") / forward_N).median().item()
        axis.plot([0, 1], [1, reverse], "k.", label="forward and reverse KL")
        axis.set(title=f"teacher {name}", xlabel="beta", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gradient, forward KL = 1")
    axes[0].legend(fontsize=7)
    figure.savefig(PATH, dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
