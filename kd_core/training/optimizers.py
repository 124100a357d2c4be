"""SGD with decoupled weight decay, and the groups of parameters that decay."""

from typing import Any

import torch
from torch import nn


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
