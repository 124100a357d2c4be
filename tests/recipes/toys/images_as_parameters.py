"""Points, their soft labels and an inner learning rate, trained through three unrolled steps: a recipe without DeepSpeed."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from kd_core.runs.flags import RunFlags
from kd_core.training.loop import start
from kd_core.training.processes import end_process


@dataclasses.dataclass(frozen=True)
class Config(RunFlags):
    """Distils random experts into four points."""

    lr: float = 0.1
    """Of the points."""


class Synthetic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.points, self.labels = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.zeros(4, 3))
        self.log_lr = nn.Parameter(torch.tensor(-2.0))


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    with start(__file__, Config, typed, preset) as run:
        run.prepare(lambda _: None)
        synthetic = Synthetic()
        optimizer = torch.optim.SGD(synthetic.parameters(), lr=run.cfg.lr, momentum=0.5)
        engine = run.plain_engine(synthetic, optimizer)
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        for step in run.steps(evaluate=lambda: {"eval/loss": float(synthetic.points.square().mean())}):
            # Experts of (seed, step, rank): torch's generator.
            weights, expert = (
                {name: 0.3 * torch.randn_like(w) for name, w in net.named_parameters()} for _ in range(2)
            )
            now = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
            for _ in range(3):
                loss = cross_entropy(functional_call(net, now, synthetic.points), synthetic.labels.softmax(-1))
                gradients = torch.autograd.grad(loss, list(now.values()), create_graph=True)
                moved = zip(now.items(), gradients, strict=True)
                now = {name: weight - synthetic.log_lr.exp() * gradient for (name, weight), gradient in moved}
            far, near = (
                sum((expert[name] - one[name]).square().sum() for name in net.state_dict()) for one in (now, weights)
            )
            with step.part("sample"):
                step.backward(engine, far / near)
            step.update(engine, lr=run.cfg.lr)
    return run.code


if __name__ == "__main__":
    end_process(main)
