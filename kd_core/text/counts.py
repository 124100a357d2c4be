"""Teachers of masked language models that no network is behind: how often tokens, and pairs of them, stand in the training rows.

They are controls: a gain that one of them gives too is none of a teacher's knowledge of language.

    uniform   every token alike: with forward KL at temperature 1, --kd-ratio r is label smoothing by r
    unigram   how frequent a token is
    bigram    how frequent it is behind the token to its left, as far as that one is to be seen

Shapes: V vocabulary, B rows, T positions, N supervised positions.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kd_core.text.masking import masking_vocabulary

if TYPE_CHECKING:
    from kd_core.text.corpus import Corpus

NAMES = ("uniform", "unigram", "bigram")
MOST_TOKENS = 4096  # of which pairs are counted: a table of 64 MiB
ROWS_AT_ONCE = 2**16
NEVER = -100.0  # the logit of what has no place in a text


class CountedBert(nn.Module):
    """The logarithms of a table of shares, [1, V], or [V, V] by the token to the left; called as a BERT is."""

    table_LV: Tensor

    def __init__(self, shares_LV: Tensor) -> None:
        super().__init__()
        self.register_buffer("table_LV", shares_LV.float().log().clamp(min=NEVER))

    def forward(self, input_ids_BT: Tensor, positions_N: Tensor) -> Tensor:
        """positions into B * T -> float32 [N, V]. Rows begin with a special token, which is never supervised."""
        if len(self.table_LV) == 1:
            return self.table_LV.expand(len(positions_N), -1)
        return self.table_LV[input_ids_BT.flatten()[positions_N - 1]]


def check(name: str, corpus: "Corpus") -> None:
    """
    Raises:
        ValueError: an unknown name, a corpus that is too large to be counted, or too many tokens for pairs of them.
    """
    flag, size = f"--teachers counts:{name}", len(corpus.tokenizer)
    if name not in NAMES:
        raise ValueError(f"{flag} is not known; name one of {', '.join(f'counts:{known}' for known in NAMES)}")
    if corpus.num_shards > 1:
        raise ValueError(
            f"{flag} counts all of --data, and {corpus.name} is too large for that; give a file or a folder"
        )
    if name == "bigram" and size > MOST_TOKENS:
        raise ValueError(
            f"{flag} needs a vocabulary of at most {MOST_TOKENS} tokens, got {size}; choose counts:unigram"
        )


def teacher(name: str, corpus: "Corpus") -> CountedBert:
    """The teacher of a name that `check` has passed."""
    ordinary, size = torch.from_numpy(masking_vocabulary(corpus.tokenizer).ordinary_ids), len(corpus.tokenizer)
    rows, table = corpus.rows(0), name == "bigram"
    counts_LV = torch.zeros(size if table else 1, size, dtype=torch.float64)
    for at in range(0, len(rows) if name != "uniform" else 0, ROWS_AT_ONCE):
        left, right = rows[at : at + ROWS_AT_ONCE, :-1].astype(np.int64), rows[at : at + ROWS_AT_ONCE, 1:]
        places = (left * size + right if table else right).reshape(-1)
        counts_LV += torch.from_numpy(np.bincount(places, minlength=counts_LV.numel())).view(counts_LV.shape)
    alike_V = torch.zeros(size, dtype=torch.float64)
    alike_V[ordinary] = 1 / len(ordinary)
    counts_LV *= alike_V > 0
    # One more token is taken to have been seen, spread as the tokens are; of these one more, spread evenly.
    shares_V = _with_one_more(counts_LV.sum(0, keepdim=True), alike_V)
    return CountedBert(_with_one_more(counts_LV, shares_V[0]) if table else shares_V)


def _with_one_more(counts_LV: Tensor, spread_V: Tensor) -> Tensor:
    return (counts_LV + spread_V) / (counts_LV.sum(1, keepdim=True) + 1)
