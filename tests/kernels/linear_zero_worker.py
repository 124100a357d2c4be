"""Run under DeepSpeed on 2 ranks: a tied head that gives losses, its teacher sharded too; prints how far it is from one process.

Two steps on ragged rows, for ZeRO 0 to 3. Nothing is exempt from sharding, so an ungathered weight would be empty.
"""

import json
from typing import Any

import deepspeed
import torch
from torch import nn

from kd_core.kernels.linear_softmax_kl import LinearSoftmaxKL, linear_softmax_kl
from kd_core.system import ranks
from kd_core.training import engine
from kd_core.training.processes import end_process, join, leave

ROWS, V, STEPS, LR = (23, 9), 101, 2, 0.3
OPTIONS: Any = {"kd_weight": 0.7, "label_weight": 0.3, "temperature": 2.0, "chunk_rows": 4}


class Model(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.body = nn.Embedding(V, width), nn.Linear(width, width)
        self.head = LinearSoftmaxKL(width, V)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, *teacher_and_labels: Any, head: bool = True, **options: Any) -> Any:
        hidden = self.body(self.embedding(tokens)).tanh()
        return self.head(hidden, *teacher_and_labels, **options) if head else hidden


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    tokens, labels = torch.randint(V, (2, ROWS[rank]), generator=generator)
    labels[::4] = -100
    return tokens, labels


def alone() -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of one process without sharding, from logits."""
    student, teacher = Model(8, seed=0), Model(12, seed=1).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR)
    losses = []
    for step in range(STEPS):
        tokens, labels = (torch.cat(parts) for parts in zip(batch(0, step), batch(1, step), strict=True))
        sides = student(tokens, head=False), student.head.weight, teacher(tokens, head=False), teacher.head.weight
        biases = {"student_bias_V": student.head.bias, "teacher_bias_V": teacher.head.bias}
        loss, *_ = linear_softmax_kl(*sides, labels, **biases, **OPTIONS, impl="reference")
        (loss / sum(ROWS)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return student.state_dict(), losses


def main() -> int:
    weights, losses = alone()
    join(lambda: None)
    errors = {}
    for stage in range(4):
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        config = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0, "steps_per_print": 10**9}
        model, teacher_model = Model(8, seed=0), Model(12, seed=1).requires_grad_(False)
        student = engine.initialize(model, torch.optim.SGD(model.parameters(), lr=LR), config)
        teacher: Any = teacher_model
        if stage == 3:
            teacher, *_ = deepspeed.initialize(model=teacher_model, config=config, dist_init_required=False)
            assert model.head.weight.numel() == teacher_model.head.weight.numel() == 0, "nothing is sharded"
        worst = 0.0
        for step in range(STEPS):
            tokens, labels = batch(ranks.rank(), step)
            with torch.no_grad():
                hidden = teacher(tokens, head=False)
            head = teacher_model.head
            with deepspeed.zero.GatheredParameters([head.weight, head.bias]):
                loss, *_ = student(tokens, hidden, head.weight, labels, teacher_bias_V=head.bias, **OPTIONS)
            engine.backward(student, loss, torch.tensor(float(sum(ROWS))))
            engine.update(student, LR)
            worst = max(worst, abs(float(ranks.total(loss.detach())) / losses[step] - 1))
        state = engine.gathered_state_dict(student)
        if ranks.rank() == 0:
            off = max(float((state[name] - weight).abs().max()) for name, weight in weights.items() if name in state)
            errors[stage] = [off, worst]
    if ranks.rank() == 0:
        print("ERRORS " + json.dumps(errors), flush=True)
    leave()
    return 0


if __name__ == "__main__":
    end_process(main)
