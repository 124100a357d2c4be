"""Attention that knows where documents begin, instead of a mask over all pairs of a row's tokens.

On a GPU it is torch's flash attention for sequences of unequal length, whose time and memory grow with each document's length
and not the row's. transformers' own way to it looks at positions in batches of one row only: in longer ones documents of a row
would see each other.

Shape letters: B rows, T positions, H heads, K heads of keys and values, D width of a head, N = B * T.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

NAME = "varlen"


def give(lm: Any, what: str) -> None:
    """Has a model of transformers attend so.

    Raises:
        ValueError: its layers do not ask which attention they shall have.
    """
    lm.set_attn_implementation(NAME)
    if not has(lm):
        raise ValueError(f"{what} ({type(lm).__name__}) has an attention of its own; leave --attention varlen out")


def has(lm: Any) -> bool:
    return bool(lm.config._attn_implementation == NAME)


def documents(position_ids_BT: Tensor) -> dict[str, Any]:
    """What a model of transformers hands on to its attention: where documents begin in N, and N; the longest there can be.

    Waits for the GPU, once a forward.
    """
    begins = (position_ids_BT.flatten() == 0).nonzero().flatten()
    bounds = F.pad(begins, (0, 1), value=position_ids_BT.numel()).to(torch.int32)
    return {"cu_seq_lens_q": bounds, "max_length_q": position_ids_BT.shape[1]}


def attention(
    module: Any,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' form of an attention function: what its layers call, and [B, T, H, D] that they take.

    Raises:
        ValueError: the model has an attention that this is not.
    """
    if softcap or dropout:
        lacks = "soft cap" if softcap else "dropout"
        raise ValueError(
            f"--attention varlen has no {lacks} of attention, which {type(module).__name__} asks for; leave it out"
        )
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query_BHTD, key_BKTD, value_BKTD))
    left = -1 if sliding_window is None else sliding_window - 1
    if query.is_cuda and query.dtype != torch.float32:
        ends, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
        settings: dict[str, Any] = {"scale": scaling, "window_size": (left, 0), "enable_gqa": True}
        out: Any = varlen_attn(query, key, value, *ends, *longest, **settings)
    else:
        out = one_by_one(query, key, value, cu_seq_lens_q, scaling, left)
    return out.unflatten(0, (query_BHTD.shape[0], query_BHTD.shape[2])), None


@torch.compiler.disable
def one_by_one(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, left: int) -> Tensor:
    """The same where there is no kernel for it, on a CPU and in float32: [N, H, D], a document at a time."""
    outs = []
    for start, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (each[start:end].transpose(0, 1) for each in (query, key, value))
        at = torch.arange(end - start, device=query.device)
        seen = (at <= at[:, None]) & (at >= at[:, None] - left) if 0 <= left < end - start else None
        out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scaling, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


AttentionInterface.register(NAME, attention)
