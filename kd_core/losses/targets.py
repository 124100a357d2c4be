"""What students are fitted to, where that is more than labels and a teacher's logits as they are.

Shape letters: N rows, V columns.
"""

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
