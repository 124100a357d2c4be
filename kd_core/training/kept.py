"""What a run keeps besides its engines, for `Run.keep`: a moving average of the weights, the best evaluation; what a step changes."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Ema:
    """Exponential moving average of a module's parameters and buffers, for evaluation; float32, on every rank.

    Up to its first update it is the weights themselves, so that their random initialisation has no part in it.

    Source: Composer's EMA: half-life in steps, an update every fifth of it. ZeRO-3 splits the weights, so it has none.

    Args:
        half_life: optimizer steps after which a weight counts half; 0: there is no average, and nothing happens.
    """

    def __init__(self, module: nn.Module, half_life: int) -> None:
        tensors = module.state_dict(keep_vars=True).values() if half_life else ()
        self._live = [tensor for tensor in tensors if tensor.is_floating_point()]
        self.average = [tensor.detach().float().clone() for tensor in self._live]
        self._every = max(1, half_life // 5)
        self._share = 1 - 0.5 ** (self._every / half_life) if half_life else 0.0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after `step` steps, if it is one of those."""
        if self._live and (step < self._every or step % self._every == 0):
            share = self._share if step > self._every else 1.0
            torch._foreach_lerp_(self.average, [tensor.detach().float() for tensor in self._live], share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the module's weights are the average."""
        kept = [tensor.detach().clone() for tensor in self._live]
        _copy(self._live, self.average)
        try:
            yield
        finally:
            _copy(self._live, kept)

    def state_dict(self) -> list[Tensor]:
        return self.average

    def load_state_dict(self, state: list[Tensor]) -> None:
        _copy(self.average, state)


class Best:
    """The best evaluation so far by one metric, of which higher is better."""

    def __init__(self, metric: str) -> None:
        self._metric, self._value = metric, -math.inf

    def improves(self, scores: Mapping[str, float]) -> bool:
        """Whether these are the best so far; then they are from now on."""
        better = scores[self._metric] > self._value
        self._value = max(self._value, scores[self._metric])
        return better

    def state_dict(self) -> float:
        return self._value

    def load_state_dict(self, state: float) -> None:
        self._value = state


class Before:
    """Where a step begins: what forwards and the recipe may change before the first update, which alone changes weights."""

    def __init__(self, engines: Iterable[Any], kept: Mapping[str, Any]) -> None:
        self._buffers = [buffer for engine in engines for buffer in engine.module.buffers()]
        self._values = [buffer.detach().clone() for buffer in self._buffers]
        self._kept = kept
        self._leaves, self._marks = _marks(kept)

    def restore(self) -> bool:
        """Puts the buffers back, running statistics for example; False when what the recipe keeps has changed, or may have."""
        if _marks(self._kept)[1] != self._marks:
            return False
        _copy(self._buffers, self._values)
        return True


def _marks(kept: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """The parts of what is kept, and what is other once one has changed; of tensors their memory and how often it was written."""
    leaves = tree_leaves({name: one.state_dict() for name, one in kept.items()})
    return leaves, [(leaf.data_ptr(), leaf._version) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


@torch.no_grad()
def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
