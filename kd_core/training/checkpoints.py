"""Checkpoints: complete or invisible, checked before they are read, of any number of engines.

    checkpoints/step00000300/            the first engine's files, as DeepSpeed writes them
    checkpoints/step00000300/<name>/     those of each further engine
    checkpoints/step00000300/state.pt    what else the run needs: clocks, the data's position, what the recipe keeps
    checkpoints/step00000300/manifest.json

DeepSpeed moves its own `latest` before the other ranks' shards are complete and never checks what it reads. Here the
checkpoint grows in a hidden folder; a manifest of SHA-256 sums and one rename make it visible. DeepSpeed also runs whatever code
a file of its asks for. Here a checkpoint, which may be somebody else's, is read by `restricted` alone.
"""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kd_core.system.checked import DamagedError, read_json
from kd_core.system.files import Unwritable, file_digest, folder_bytes, sync, writing
from kd_core.system.ranks import broadcast, rank
from kd_core.system.terminal import one_line

REMEDY = "leave that checkpoint out"


def save(folder: Path, step: int, engines: Mapping[str, Any], state: dict[str, Any], keep: int) -> None:
    """Writes `folder/step<step>` and removes all but the newest `keep`; call on every rank.

    Args:
        engines: by name; the first one's files lie directly in the checkpoint.
        state: equal on all ranks; tensors, numbers, strings and containers of them.
    """
    hidden, name = folder / ".incomplete", f"step{step:08d}"
    if rank() == 0:
        shutil.rmtree(hidden, ignore_errors=True)
        with writing(folder / name):
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
        if _is_ours(folder / name):
            (folder / name).rename(hidden / f"{name}.old")
        elif os.path.lexists(folder / name):
            (folder / name).rename(folder / f"{name}.kept")
        (hidden / name).rename(folder / name)
        sync(folder)
        there = [other for other in checkpoint_names(folder) if _is_ours(folder / other)]
        newer = [other for other in there if step_of(other) > step]  # damaged: the run was resumed before them
        for old in newer + [other for other in there if other not in newer][:-keep]:
            (folder / old).rename(hidden / f"{old}.old")  # of a link the link
        shutil.rmtree(hidden, ignore_errors=True)  # all but what a reader has open on NFS
    dist.barrier()


def _is_ours(checkpoint: Path) -> bool:
    """Whether a run has made it, rather than a user who has given something such a name."""
    return (checkpoint / "manifest.json").exists()


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


@contextlib.contextmanager
def restricted(checkpoint: Path) -> Iterator[None]:
    """Within, `torch.load` makes tensors, numbers, strings, containers of them and what DeepSpeed keeps beside them, whoever calls it.

    Raises:
        ValueError: a file of `checkpoint` has something else in it, which may be code, or is none of PyTorch's.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(enum: Any, name: str) -> Any:  # how Python before 3.11.4 writes one of an enum, by getattr
        if enum is not ZeroStageEnum or name not in list(ZeroStageEnum.__members__):
            raise UnpicklingError(f"it asks for getattr of {enum}, which no checkpoint has and may be code")
        return enum[name]

    # PyTorch's own switches; DeepSpeed's loads ask for weights_only=False.
    forced, off = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (forced, off)}
    os.environ[forced] = "1"
    try:
        with torch.serialization.safe_globals(
            [LossScaler, ZeroStageEnum, fragment_address, (member, "builtins.getattr")]
        ):
            for file in sorted(checkpoint.rglob("*.pt")):
                _refuse_code(file)
            yield
    except UnpicklingError as error:
        raise DamagedError(checkpoint, one_line(error), REMEDY) from None
    finally:
        del os.environ[forced]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _refuse_code(file: Path) -> None:
    """Names the file: what `torch.load` says within `restricted` does not. It is that which refuses."""
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (ValueError, RuntimeError, UnpicklingError, EOFError, LookupError) as error:
        raise DamagedError(file, f"none of PyTorch's: {one_line(error)}", REMEDY) from None
    if asked:
        raise DamagedError(file, f"it asks for {asked[0]}, which no checkpoint has and may be code", REMEDY)


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
        sums = read_json(checkpoint / "manifest.json")
        there = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*.pt")}
        if unnamed := sorted(there - sums.keys()):
            return f"manifest.json has nothing of {unnamed[0]}"
        if not there:
            return "it is empty"
        return next((name for name, digest in sums.items() if file_digest(checkpoint / name) != digest), "")
    except (OSError, ValueError) as error:
        return str(error).partition(";")[0]


def step_of(checkpoint: str | None) -> int:
    """The number of steps taken when `checkpoint` was written; 0 without one."""
    return int(checkpoint.removeprefix("step")) if checkpoint else 0


def steps_complete(state: Mapping[str, Any], step: int) -> int:
    """The steps that nothing is left of: not the last, where its evaluation is left to the run that is resumed."""
    return step - bool(state.get("owed"))


def load(folder: Path, checkpoint: str, engine: Any, name: str, *, first: bool) -> None:
    """Restores weights and optimizer of one engine.

    Raises:
        ValueError: the checkpoint has no engine of that name.
    """
    tag = checkpoint if first else f"{checkpoint}/{name}"
    path = None
    if (folder / tag).is_dir():
        with restricted(folder / checkpoint):
            path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise ValueError(
            f"--resume: {folder / checkpoint} holds nothing of the engine {name!r}; resume with the recipe that wrote it, "
            "or start a new run in another --out"
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`; of a checkpoint from before there was state.pt, DeepSpeed's client state."""
    file = checkpoint / "state.pt"
    return _load(checkpoint, file) if file.exists() else _first_shard(checkpoint)


def _first_shard(checkpoint: Path) -> dict[str, Any]:
    shards = sorted(checkpoint.glob("*_model_states.pt"))
    if not shards:
        raise DamagedError(checkpoint, "it is empty", REMEDY)
    return _load(checkpoint, shards[0])


def _load(checkpoint: Path, file: Path) -> dict[str, Any]:
    with restricted(checkpoint):
        states: dict[str, Any] = torch.load(file, map_location="cpu")
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

    with contextlib.redirect_stdout(None), restricted(checkpoint):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
