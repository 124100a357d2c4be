"""Checkpoints: complete or invisible, checked before they are read, of any number of engines.

    checkpoints/step00000300/            the first engine's files, as DeepSpeed writes them
    checkpoints/step00000300/<name>/     those of each further engine
    checkpoints/step00000300/state.pt    what else the run needs: clocks, the data's position, what the recipe keeps
    checkpoints/step00000300/manifest.json

DeepSpeed moves its own `latest` before the other ranks' shards are complete and never checks what it reads. Here the
checkpoint grows in a hidden folder; a manifest of SHA-256 sums and one rename make it visible.
"""

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kd_core.system.files import Unwritable, file_digest, folder_bytes, sync, writing
from kd_core.system.ranks import broadcast, rank


def save(folder: Path, step: int, engines: Mapping[str, Any], state: dict[str, Any], keep: int) -> None:
    """Writes `folder/step<step>` and removes all but the newest `keep`; call on every rank.

    Args:
        engines: by name; the first one's files lie directly in the checkpoint.
        state: equal on all ranks; tensors, numbers, strings and containers of them.
    """
    hidden, name = folder / ".incomplete", f"step{step:08d}"
    if rank() == 0:
        shutil.rmtree(hidden, ignore_errors=True)
        (hidden / name).mkdir(parents=True)
    dist.barrier()
    try:
        with writing(folder / name, needs=_needed(folder, engines)):
            for number, (own, engine) in enumerate(engines.items()):
                tag = f"{name}/{own}" if number else name
                engine.save_checkpoint(str(hidden), tag=tag, client_state={}, save_latest=False)
            if rank() == 0:
                torch.save(state, hidden / name / "state.pt")
    except Unwritable:
        shutil.rmtree(hidden, ignore_errors=True)  # of no use, and in the way on a full disk
        raise
    dist.barrier()
    if rank() == 0:
        with writing(folder / name):
            _write_manifest(hidden / name)
        shutil.rmtree(folder / name, ignore_errors=True)
        (hidden / name).rename(folder / name)
        sync(folder)
        shutil.rmtree(hidden)
        there = checkpoint_names(folder)
        newer = [other for other in there if step_of(other) > step]  # damaged: the run was resumed before them
        for old in newer + [other for other in there if other not in newer][:-keep]:
            shutil.rmtree(folder / old)
    dist.barrier()


def _needed(folder: Path, engines: Mapping[str, Any]) -> int:
    """Bytes of a checkpoint, as of the last one; of the first, those of its weights in float32 and twice that for Adam."""
    there = checkpoint_names(folder)
    if there:
        return folder_bytes(folder / there[-1])
    parameters = (parameter for engine in engines.values() for parameter in engine.module.parameters())
    return sum(12 * getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def _write_manifest(folder: Path) -> None:
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            sums[str(file.relative_to(folder))] = file_digest(file)
            sync(file)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(sums, indent=1))
    sync(manifest)
    sync(folder)


def newest_checkpoint(folder: Path) -> str | None:
    """Name of the newest checkpoint in `folder` whose manifest holds; the same on every rank.

    A damaged one is named and passed over.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    name = broadcast(_newest_sound(folder) if rank() == 0 else None)
    if name is None and checkpoint_names(folder):
        raise ValueError(f"--resume: all checkpoints in {folder} are damaged; start a new run in another --out")
    return name


def _newest_sound(folder: Path) -> str | None:
    for name in reversed(checkpoint_names(folder)):
        candidate = folder / name
        damage = _damage(candidate)
        if not damage:
            return name
        print(f"checkpoint {candidate} is damaged ({damage}): trying an older one", file=sys.stderr, flush=True)
    return None


def checkpoint_names(folder: Path) -> list[str]:
    """The checkpoints in `folder`, oldest first; what a user keeps beside them under other names is left alone."""
    return sorted(
        path.name for path in folder.glob("step*") if re.fullmatch(r"step\d{8,}", path.name) and path.is_dir()
    )


def _damage(checkpoint: Path) -> str:
    """What in a checkpoint is not as its manifest says; "" when it holds."""
    try:
        sums = json.loads((checkpoint / "manifest.json").read_text())
        return next((name for name, digest in sums.items() if file_digest(checkpoint / name) != digest), "")
    except (OSError, ValueError) as error:
        return str(error)


def step_of(checkpoint: str | None) -> int:
    """The number of steps taken when `checkpoint` was written; 0 without one."""
    return int(checkpoint.removeprefix("step")) if checkpoint else 0


def load(folder: Path, checkpoint: str, engine: Any, name: str, *, first: bool) -> None:
    """Restores weights and optimizer of one engine.

    Raises:
        ValueError: the checkpoint has no engine of that name.
    """
    tag = checkpoint if first else f"{checkpoint}/{name}"
    path, _ = engine.load_checkpoint(str(folder), tag=tag) if (folder / tag).is_dir() else (None, {})
    if path is None:
        raise ValueError(
            f"--resume: {folder / checkpoint} holds nothing of the engine {name!r}; resume with the recipe that wrote it, "
            "or start a new run in another --out"
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`; of a checkpoint from before there was state.pt, DeepSpeed's client state."""
    file = checkpoint / "state.pt"
    if file.exists():
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state
    return _first_shard(checkpoint)


def _first_shard(checkpoint: Path) -> dict[str, Any]:
    shard = next(iter(sorted(checkpoint.glob("*_model_states.pt"))))
    states: dict[str, Any] = torch.load(shard, map_location="cpu", weights_only=False)
    return states


def read_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    """The first engine's full state dict from a checkpoint of any ZeRO stage, without the ranks it had.

    Weights are in the compute dtype, of ZeRO-3 in float32.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    damage = _damage(checkpoint)
    if damage:
        raise ValueError(f"checkpoint {checkpoint} is damaged ({damage}); leave it out")
    if not any(checkpoint.glob("zero_pp_rank_*_model_states.pt")):
        module: dict[str, Tensor] = _first_shard(checkpoint)["module"]
        return module
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(None):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
