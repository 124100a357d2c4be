"""A judge of whose logits it sees, and what it and the student make of that. Shape letters: N rows, V columns."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

LEAST_WIDTH = 8  # of a layer, where there are few columns


class Discriminator(nn.Module):
    """Log-odds that logits are a teacher's and not the student's, [N, V] -> float32 [N].

    It sees log-probabilities, as a constant added to logits is no mark of a model. Three layers of widths V / 8, V / 64 and 1.

    Source: MEAL V2, arXiv 2009.08453, and its released discriminator.py, whose last layer has two outputs and ends in a ReLU: there
    neither can speak against a class, so it is left out here.
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        widths = [columns, max(LEAST_WIDTH, columns // 8), max(LEAST_WIDTH, columns // 64)]
        self.layers = nn.Sequential(
            nn.Linear(widths[0], widths[1]),
            nn.ReLU(),
            nn.Linear(widths[1], widths[2]),
            nn.ReLU(),
            nn.Linear(widths[2], 1),
        )

    def forward(self, logits_NV: Tensor) -> Tensor:
        log_probs_NV = torch.log_softmax(logits_NV.float(), -1)
        return self.layers(log_probs_NV.to(next(self.parameters()).dtype)).squeeze(-1).float()


def told_apart(of_teacher_N: Tensor, of_student_N: Tensor) -> Tensor:
    """What the discriminator descends: binary cross-entropy of its log-odds for a teacher's and for the student's row, [N]."""
    return softplus(-of_teacher_N) + softplus(of_student_N)


def fooled(of_student_N: Tensor, *, cooperative: bool = False) -> Tensor:
    """What the student descends, [N]: -log P(teacher's), the smaller the more its rows are taken for a teacher's.

    Args:
        cooperative: its part of `told_apart` in place of that, -log P(student's): the student helps to be recognised. So does the
            released code of MEAL V2, where one optimizer descends both losses without a reversal.
    """
    return softplus(of_student_N if cooperative else -of_student_N)
