"""An engine without DeepSpeed, for what is no network or needs gradients of gradients: images as parameters, unrolled inner
loops, learned weights. It has the part of DeepSpeed's surface that the loop uses, so a recipe treats both alike.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_core.system.ranks import rank, world_size


class PlainEngine(nn.Module):
    """Parameters replicated on every rank, gradients averaged over ranks in the update; any number of backward passes.

    Args:
        module: what is trained; an `nn.ParameterList` where it is no network.
        optimizer: of its parameters.
        clip: largest global gradient norm; 0 does not clip.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, *, clip: float = 0.0) -> None:
        super().__init__()
        self.module, self.optimizer, self._clip = module, optimizer, clip
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def _trained(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reduce(self) -> float:
        """Averages the gradients over ranks, clips them, and returns their global norm before that.

        A gradient that only other ranks have counts as zero on this one.
        """
        everything = self._trained()
        has = torch.tensor([float(parameter.grad is not None) for parameter in everything], device=everything[0].device)
        dist.all_reduce(has)
        trained = [parameter for parameter, ranks in zip(everything, has.tolist(), strict=True) if ranks]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
        if self._clip:
            nn.utils.clip_grads_with_norm_(trained, self._clip, norm)
        return float(norm)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save_checkpoint(self, folder: str, *, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        """As DeepSpeed's, for `training.checkpoints`; every rank has the same."""
        if rank() == 0:
            (Path(folder) / tag).mkdir(parents=True, exist_ok=True)
            state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, Path(folder) / tag / "plain.pt")

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str | None, dict[str, Any]]:
        file = Path(folder) / tag / "plain.pt"
        if not file.exists():
            return None, {}
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        return folder, {}
