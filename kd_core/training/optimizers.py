"""SGD with decoupled weight decay, and the moving average of weights. Both are the same on every rank."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def decay_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices and filters, none on batch normalisation and biases."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class DecoupledSGD(torch.optim.SGD):
    """SGD whose weight decay does not pass through the momentum: a weight loses `weight_decay * lr / peak lr` a step.

    Source: Loshchilov and Hutter 2017, arXiv 1711.05101, in Composer's form (DecoupledSGDW).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        # Under another name, or torch's own step would add the decay to the gradient.
        groups = [{**group, "decoupled": group.get("weight_decay", 0.0), "weight_decay": 0.0} for group in groups]
        super().__init__(groups, lr=lr, momentum=momentum)
        self.peak_lr = lr

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["decoupled"] and moving:
                torch._foreach_mul_(moving, 1 - group["decoupled"] * group["lr"] / self.peak_lr)
        return super().step(closure)


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

    def load(self, average: list[Tensor]) -> None:
        """Continues from the `average` of a checkpoint."""
        _copy(self.average, average)


@torch.no_grad()
def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
