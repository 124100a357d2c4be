"""How much of a row's loss is the teacher's, learned from where student, teacher and truth stand to each other.

Shape letters: N rows, C classes, D width of the embeddings.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, one_hot


class TrilateralRatio(nn.Module):
    """alpha in (0, 1) for each row: the weight of the teacher's term, the labels get the rest.

    A small network on S = softmax(student), T = softmax(teacher), G = the true class, B = the teacher's mean in that class, and the
    squares, column by column, of B - S, G - S, T - S, T - G and B - G: 9 C numbers, layers of 32, 16 and 1, leaky ReLUs, a sigmoid.

    Attributes:
        means_CC: B by class, from `class_means`; even until they are set.

    Source: TGeo-KD, arXiv 2312.15112; edges, widths and squares in place of norms as in a re-implementation.
    """

    means_CC: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.means_CC = nn.Buffer(torch.full((num_classes, num_classes), 1 / num_classes))
        self.layers = nn.Sequential(
            nn.Linear(9 * num_classes, 32), nn.LeakyReLU(), nn.Linear(32, 16), nn.LeakyReLU(), nn.Linear(16, 1)
        )

    def forward(self, student_logits_NC: Tensor, teacher_logits_NC: Tensor, labels_N: Tensor) -> Tensor:
        """float32 [N]; gradients reach the network's weights only."""
        s_NC, t_NC = (logits.detach().float().softmax(-1) for logits in (student_logits_NC, teacher_logits_NC))
        g_NC, b_NC = one_hot(labels_N, s_NC.shape[1]).float(), self.means_CC.float()[labels_N]
        edges = [
            (one - other).square()
            for one, other in ((b_NC, s_NC), (g_NC, s_NC), (t_NC, s_NC), (t_NC, g_NC), (b_NC, g_NC))
        ]
        state = torch.cat([s_NC, t_NC, g_NC, b_NC, *edges], 1)
        return self.layers(state.to(next(self.parameters()).dtype)).squeeze(-1).float().sigmoid()


def class_sums(teacher_logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Of each class the sum of the teacher's probabilities over its rows, and their number: [C, C + 1]; these add up over batches."""
    p_NC = teacher_logits_NC.detach().double().softmax(-1)
    rows_NC = torch.cat([p_NC, torch.ones_like(p_NC[:, :1])], 1)
    return one_hot(labels_N, p_NC.shape[1]).double().T @ rows_NC


def class_means(sums: Tensor) -> Tensor:
    """The teacher's mean in each class, float32 [C, C]; even in a class without rows."""
    counts = sums[:, -1:]
    even = torch.full_like(sums[:, :-1], 1 / len(sums))
    return torch.where(counts > 0, sums[:, :-1] / counts.clamp(min=1), even).float()


def mixed_gradient(
    alpha_N: Tensor, student_logits_NC: Tensor, teacher_logits_NC: Tensor, labels_N: Tensor, *, temperature: float
) -> Tensor:
    """The gradient of mean_i (alpha_i tau^2 KL(p_T || p_S) + (1 - alpha_i) CE) by the student's logits, float32 [N, C]; linear in alpha.

    Of row i it is alpha_i tau (p_S - p_T) at tau + (1 - alpha_i) (p_S - y) at 1, over N. Gradients of it reach alpha only.
    """
    student_NC, teacher_NC = student_logits_NC.detach().float(), teacher_logits_NC.detach().float()
    kd_NC = temperature * ((student_NC / temperature).softmax(-1) - (teacher_NC / temperature).softmax(-1))
    label_NC = student_NC.softmax(-1) - one_hot(labels_N, student_NC.shape[1])
    return (alpha_N[:, None] * kd_NC + (1 - alpha_N[:, None]) * label_NC) / len(alpha_N)


def look_ahead(
    head: nn.Linear, embeddings_ND: Tensor, gradient_NC: Tensor, others_MD: Tensor, labels_M: Tensor, *, lr: float
) -> Tensor:
    """Cross-entropy of other rows after one step of the head, float32 [M]; gradients reach `gradient_NC` only.

    For a linear layer a gradient by its outputs gives that by its weights without a graph, so no gradient of a gradient is taken.

    Args:
        head: the layer that makes the logits of the embeddings.
        gradient_NC: of a mean over rows, by the outputs of the head for `embeddings_ND`.
        others_MD, labels_M: embeddings and labels of the other rows.
    """
    weight_CD = head.weight.detach().float() - lr * gradient_NC.T @ embeddings_ND.detach().float()
    bias_C = None if head.bias is None else head.bias.detach().float() - lr * gradient_NC.sum(0)
    return cross_entropy(linear(others_MD.detach().float(), weight_CD, bias_C), labels_M, reduction="none")
