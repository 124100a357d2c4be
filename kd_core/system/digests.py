"""Digests of tensors and modules."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def stored(tensor: Tensor) -> list[Tensor]:
    """The tensors that a quantised one consists of; another is its own."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in stored(getattr(tensor, name))]


def weights_digest(model: nn.Module) -> str:
    return tensor_digest(sorted(model.state_dict().items()))


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Of names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        for part in stored(tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
