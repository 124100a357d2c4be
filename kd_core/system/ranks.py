"""Which process of the run this is, its device, and the small collectives between processes."""

import functools
import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else importing DeepSpeed warns that it found no GPU


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache  # asked often in a step; on a CPU, torch looks for the driver's libraries each time
def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def broadcast(value: T) -> T:
    """Rank 0's `value` on every rank; any picklable object."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: T) -> list[T]:
    """Every rank's `value`, on every rank; any picklable object."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(value: float | Tensor) -> Tensor:
    """Sum of `value` over all ranks, on the device: reading it is the caller's choice."""
    dtype = torch.float64 if device().type == "cpu" else torch.float32
    if isinstance(value, Tensor):
        result = value.to(device(), dtype, copy=True)
    else:
        result = torch.full((), value, dtype=dtype, device=device())  # filled there: a copy would wait for the GPU
    dist.all_reduce(result)
    return result


def to_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on this rank's device; pinned ones are copied while the GPU computes."""
    return tuple(tensor.to(device(), non_blocking=True) for tensor in tensors)
