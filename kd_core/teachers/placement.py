"""Where the weights of a pool live, so that many teachers fit: pinned CPU memory behind two slots on the GPU, or a share
of the pool on each rank. (kd_core/training/engine.py splits one large teacher by ZeRO-3.)"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kd_core.system.ranks import device, rank, world_size
from kd_core.system.terminal import say
from kd_core.teachers.flags import TeacherFlags
from kd_core.teachers.sources import source_of
from kd_core.training.engine import split_by_zero3

ALIGNMENT = 512  # bytes, as PyTorch's own allocator, so that kernels choose what they choose for resident weights


def place(cfg: TeacherFlags, models: dict[str, nn.Module]) -> tuple[dict[str, nn.Module], "PinnedTeachers | None"]:
    """The models by source, on the CPU, placed as --teacher-placement says; and where they are pinned, if they are.

    Raises:
        ValueError: a placement that does not fit the teachers and ranks.
    """
    placement, on_gpu = cfg.teacher_placement, device().type == "cuda"
    for flag, chosen in (("--teacher-placement host", placement == "host"), ("--teacher-ahead", cfg.teacher_ahead)):
        if chosen and not on_gpu and rank() == 0:
            say(f"{flag} has no effect without a GPU")
    if placement == "host" and on_gpu:
        return models, PinnedTeachers(list(models.values()), device())
    if placement == "zero3":
        return {source: split_by_zero3(model, cfg.teacher_deepspeed_config) for source, model in models.items()}, None
    for index in held_by(cfg, rank()):
        models[source_of(cfg.teachers[index])].to(device())
    return models, None


def held_by(cfg: TeacherFlags, of_rank: int) -> Sequence[int]:
    """Indices of the teachers that a rank holds: all, unless --teacher-placement is sharded."""
    if cfg.teacher_placement == "sharded":
        return teachers_of_rank(len(cfg.teachers), of_rank, world_size())
    return range(len(cfg.teachers))


def teachers_of_rank(num_teachers: int, rank: int, world_size: int) -> tuple[int, ...]:
    """Indices that rank `rank` holds of a sharded pool: the teachers, or the ranks, are dealt round in turn.

    Raises:
        ValueError: the numbers of teachers and ranks do not divide, so that some teachers would be heard more than others.
    """
    few, many = sorted((num_teachers, world_size))
    if many % few:
        raise ValueError(
            f"--teacher-placement sharded needs a number of --teachers that divides the {world_size} rank(s), or is a "
            f"multiple of them, got {num_teachers}; change one of them, or choose another placement"
        )
    return tuple(index for index in range(num_teachers) if index % few == rank % few)


class PinnedTeachers:
    """Teachers whose weights stay in pinned CPU memory; at most two are on the GPU at a time, whatever their number.

    There are two slots, each as large as the largest teacher. While the teacher in one answers, a side stream copies the
    next into the other. No copy overwrites weights before their last reader has passed.

    Args:
        models: on the CPU; their parameters and buffers become views into pinned memory or into a slot.
        device: the GPU.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        self._host = {model: _pack(model) for model in models}
        largest = max(len(flat) for flat in self._host.values())
        slots = min(2, len(self._host))
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._inside: list[nn.Module | None] = [None] * slots
        self._filled, self._read = ([torch.cuda.Event() for _ in range(slots)] for _ in range(2))
        self._recent = slots - 1  # the slot used last
        self._stream = torch.cuda.Stream(device)

    def prefetch(self, model: nn.Module) -> None:
        """Begins to copy the weights of `model`, unless they are there or on their way."""
        if model in self._inside:
            return
        slot = (self._recent + 1) % len(self._slots)
        evicted = self._inside[slot]
        if evicted is not None:
            _bind(evicted, self._host[evicted])
        flat = self._host[model]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._read[slot])
            self._slots[slot][: len(flat)].copy_(flat, non_blocking=True)
            self._filled[slot].record()
        self._inside[slot] = model
        _bind(model, self._slots[slot])

    @contextlib.contextmanager
    def on_device(self, model: nn.Module) -> Iterator[None]:
        """The block may call `model`: its weights are on the GPU, and stay until the GPU has passed the block."""
        self.prefetch(model)
        self._recent = slot = self._inside.index(model)
        torch.cuda.current_stream().wait_event(self._filled[slot])
        yield
        self._read[slot].record()


def _tensors(model: nn.Module) -> Iterator[tuple[Tensor, int, int]]:
    """Each parameter and buffer with its first and last byte in the flat memory of the model."""
    start = 0
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor, start, start + tensor.nbytes
        start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _pack(model: nn.Module) -> Tensor:
    """Moves the model's parameters and buffers into one pinned tensor, uint8 [bytes]."""
    flat = torch.empty(max(end for *_, end in _tensors(model)), dtype=torch.uint8, pin_memory=True)
    for tensor, start, end in _tensors(model):
        flat[start:end].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
    _bind(model, flat)
    return flat


def _bind(model: nn.Module, flat: Tensor) -> None:
    for tensor, start, end in _tensors(model):
        tensor.data = flat[start:end].view(tensor.dtype).view(tensor.shape)
