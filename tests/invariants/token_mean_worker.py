"""Run under DeepSpeed on 2 ranks: one step on 2 ragged micro-batches a rank, for every ZeRO stage; prints the errors.

Then a step with an infinite gradient on one rank, which must change nothing.
"""

import contextlib
import json
import math

import torch

from kd_core.system import ranks
from kd_core.training import engine
from kd_core.training.processes import end_process, join, leave

ROWS = [[3, 1], [7, 2]]  # rows of [rank][micro-batch]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def rows(rank: int, micro: int) -> torch.Tensor:
    return torch.randn(ROWS[rank][micro], 8, generator=torch.Generator().manual_seed(10 * rank + micro))


def loss_sum(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.square().sum()


def main() -> int:
    alone = model()
    everything = torch.cat([rows(rank, micro) for rank in range(2) for micro in range(2)])
    (loss_sum(alone(everything)) / len(everything)).backward()
    # One SGD step at learning rate 1 moves a weight by its gradient.
    expected = [param.detach() - param.grad for param in alone.parameters()]
    norm = float(torch.nn.utils.get_total_norm([param.grad for param in alone.parameters()]))

    join(lambda: None)
    errors = {}
    for stage in range(4):
        config = {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        student = model()
        wrapped = engine.initialize(student, torch.optim.SGD(student.parameters(), lr=0.0), config)
        step_tokens = ranks.total(sum(ROWS[ranks.rank()]))
        for micro in range(2):
            engine.backward(wrapped, loss_sum(wrapped(rows(ranks.rank(), micro))), step_tokens)
        grad_norm = engine.update(wrapped, 1.0)
        state = {name: value.clone() for name, value in engine.gathered_state_dict(wrapped).items()}
        if ranks.rank() == 0:
            moved = [state[name] for name, _ in alone.named_parameters()]
            worst = max(float((a - b).abs().max()) for a, b in zip(moved, expected, strict=True))
            errors[stage] = [worst, abs(grad_norm - norm)]
        # A gradient that is not finite on one rank stops all ranks before the optimizer has moved.
        for micro in range(2):
            broken = math.inf if ranks.rank() == 1 and micro == 0 else 1.0
            engine.backward(wrapped, broken * loss_sum(wrapped(rows(ranks.rank(), micro))), step_tokens)
        with contextlib.suppress(engine.NonFiniteStepError):
            engine.update(wrapped, 1.0)
            raise AssertionError(f"stage {stage} took a step with an infinite gradient")
        after = engine.gathered_state_dict(wrapped)
        assert all(torch.equal(value, state[name]) for name, value in after.items()), f"stage {stage} moved"
    if ranks.rank() == 0:
        print("ERRORS " + json.dumps(errors))
    leave()
    return 0


if __name__ == "__main__":
    end_process(main)
