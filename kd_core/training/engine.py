"""DeepSpeed: config, process group, token-exact normalisation, one checked step, checkpoints, clean stops.

DeepSpeed is imported inside functions: bad input is refused before those seconds are spent.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_core.cli import SharedFlags
from kd_core.launch import die_with_parent, free_port, started_by_deepspeed

T = TypeVar("T")

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else importing DeepSpeed warns that it found no GPU

# A rank that hangs ends the run after this long. DeepSpeed's own setting covers one of its groups only.
COLLECTIVE_TIMEOUT = timedelta(minutes=15)
# The other ranks wait this long at the door while local rank 0 reads and tokenises.
PREPARE_TIMEOUT = timedelta(hours=24)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 2**25  # what mallopt takes

OWNED_BY_RECIPE = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size and --micro-batch-size",
    "gradient_clipping": "--clip",
    "optimizer": "--lr and its neighbours",
    "scheduler": "--lr and --warmup-fraction",
}

# What DeepSpeed 0.19 reads at the top level and a recipe leaves to the file; it has no list of its own.
KNOWN_KEYS = frozenset(
    {"torch_autocast", "data_types", "communication_data_type", "zero_allow_untested_optimizer", "aio", "compile"}
    | {"zero_force_ds_cpu_optimizer", "prescale_gradients", "gradient_predivide_factor", "activation_checkpointing"}
    | {"flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "tensorboard"}
    | {"wandb", "csv_monitor", "checkpoint", "disable_allgather", "disable_python_gc"}
)


# --- processes --------------------------------------------------------------------------------------------------------


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache  # asked often in a step; on a CPU, torch looks for the driver's libraries each time
def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def join(prepare: Callable[[], T]) -> T:
    """Runs `prepare` on every rank and joins the process group; on each node local rank 0 goes first.

    What local rank 0 writes (caches, the run folder) the others find ready. An error there ends the run before any
    rank has joined.
    """
    if started_by_deepspeed():
        die_with_parent()  # a launcher that is killed leaves its ranks running
    if local_rank() == 0:
        result = prepare()
        _init_distributed()
        return result
    _init_distributed()
    return prepare()


def _init_distributed() -> None:
    if "RANK" not in os.environ:  # no launcher: a world of one, without MPI
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    import deepspeed
    from deepspeed.utils import logger

    if not os.environ.get("KD_VERBOSE"):
        logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # This op serves inference only, but would be compiled here: half a minute, and a compiler needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _keep_freed_memory()
    # A rank may wait here for minutes inside C++, where a Python handler cannot run and a signal would end in its trace.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    deepspeed.init_distributed(timeout=PREPARE_TIMEOUT, verbose=False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _keep_freed_memory() -> None:
    """Has glibc keep what tensors free for the next step's; by default it may give it back, and have it zeroed anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not everywhere
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, -1)


def leave() -> None:
    """Waits for all ranks and closes the process group."""
    dist.barrier()
    dist.destroy_process_group()


def end_process(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and ends the process with its code, without C++ destructors: gloo's sometimes abort, work done.

    A disk that fills up or goes away while training is one line and exit code 1.
    """
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except OSError as error:
        if os.environ.get("KD_VERBOSE"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


# --- engine -----------------------------------------------------------------------------------------------------------


def find_config(path: str, flag: str = "--deepspeed-config") -> Path:
    """The DeepSpeed JSON `path`: as given, or in `ds_configs/` beside `kd_core/`."""
    root = Path(__file__).resolve().parents[2]
    for candidate in (Path(path), root / path, root / "ds_configs" / path):
        if candidate.is_file():
            return candidate
    available = sorted(file.name for file in (root / "ds_configs").glob("*.json"))
    raise FileNotFoundError(f"{flag} {path} does not exist; give a JSON file or one of {available}")


def _read_config(path: str, flag: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: malformed JSON, an unknown key, a key that the recipe owns, or "auto".
    """
    file = find_config(path, flag)
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {file} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{flag} {file} must hold a JSON object, got {type(config).__name__}")
    for key, owner in OWNED_BY_RECIPE.items():
        if key in config:
            raise ValueError(f"{flag} {file} sets {key!r}, which {owner} sets; remove it from the file")
    _refuse_unknown_keys(config, f"{flag} {file}")
    if '"auto"' in json.dumps(config):
        raise ValueError(f'{flag} {file} has the value "auto", which only Hugging Face\'s Trainer fills in')
    return config


def load_config(cfg: SharedFlags) -> dict[str, Any]:
    """The DeepSpeed config of `--deepspeed-config` plus what the recipe owns: batch sizes, accumulation, clipping.

    Raises:
        ValueError: as `_read_config`, or a batch that does not split.
    """
    config = _read_config(cfg.deepspeed_config, "--deepspeed-config")
    share = cfg.micro_batch_size * world_size()
    if cfg.global_batch_size % share:
        raise ValueError(
            f"--global-batch-size {cfg.global_batch_size} must be a multiple of --micro-batch-size "
            f"{cfg.micro_batch_size} times {world_size()} rank(s), {share}"
        )
    return config | {
        "train_batch_size": cfg.global_batch_size,
        "train_micro_batch_size_per_gpu": cfg.micro_batch_size,
        "gradient_accumulation_steps": cfg.global_batch_size // share,
        "gradient_clipping": cfg.clip,
        "steps_per_print": 10**9,
    }


def _refuse_unknown_keys(config: dict[str, Any], what: str) -> None:
    """DeepSpeed ignores unknown keys silently at the top level, and names those below only once a model is built."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    sections = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    if config.get("fp16", {}).get("enabled"):
        raise ValueError(f"{what} enables fp16, whose loss scaling skips steps; use bf16")
    unknown = set(config) - KNOWN_KEYS - set(sections)
    for name, section in sections.items():
        keys = config.get(name, {})
        if not isinstance(keys, dict):
            raise ValueError(f"{what}: {name!r} must be an object, got {keys!r}")
        fields = section.model_fields
        known = set(fields) | {field.alias for field in fields.values()}
        unknown |= {f"{name}.{key}" for key in set(keys) - known}
    if unknown:
        raise ValueError(f"{what} has unknown keys {sorted(unknown)}; correct or remove them")


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around `model`, with every process group given a finite timeout."""
    import deepspeed

    quiet = contextlib.nullcontext() if os.environ.get("KD_VERBOSE") else contextlib.redirect_stdout(None)
    with quiet:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    c10d = dist.distributed_c10d
    set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # public since torch 2.15
    for group in list(c10d._world.pg_map):
        set_timeout(COLLECTIVE_TIMEOUT, group)
    return engine


def split_by_zero3(model: nn.Module, path: str) -> Any:
    """A ZeRO-3 engine around a frozen model, by its own config `path`: each rank holds its share of every weight.

    A forward gathers weights as it goes, so all ranks must take it together.

    Args:
        model: on the CPU, where each rank reads it whole.

    Raises:
        ValueError: as `load_config`, naming --teacher-deepspeed-config; or not stage 3, or another precision.
    """
    import deepspeed

    config = _read_config(path, "--teacher-deepspeed-config")
    stage, bf16 = config.get("zero_optimization", {}).get("stage"), config.get("bf16", {}).get("enabled", False)
    if stage != 3:
        raise ValueError(f"--teacher-deepspeed-config {path} must have zero_optimization.stage 3, got {stage}")
    dtype = next(model.parameters()).dtype
    if bf16 != (dtype == torch.bfloat16):
        raise ValueError(
            f"--teacher-deepspeed-config {path} has bf16 {'on' if bf16 else 'off'}, but the teacher is {dtype}; "
            "choose --teacher-dtype accordingly"
        )
    config |= {"train_batch_size": world_size(), "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9}
    # DeepSpeed's own linear layer would replace PyTorch's in the whole process, so in the student too.
    config["zero_optimization"] |= {"memory_efficient_linear": False}
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device())  # ZeRO-3 sees to parameters only
    with contextlib.redirect_stdout(None):
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    return initialize(model, None, config)


def destroy_engines(engines: Iterable[Any]) -> None:
    """Lets go of what DeepSpeed holds of the engines."""
    for one in engines:
        one.destroy()


def total(value: float | Tensor) -> Tensor:
    """Sum of `value` over all ranks, on the device: reading it is the caller's choice."""
    dtype = torch.float64 if device().type == "cpu" else torch.float32
    if isinstance(value, Tensor):
        result = value.to(device(), dtype, copy=True)
    else:
        result = torch.full((), value, dtype=dtype, device=device())  # filled there: a copy would wait for the GPU
    dist.all_reduce(result)
    return result


def backward_token_mean(engine: Any, loss_sum: Tensor, step_tokens: Tensor) -> None:
    """Adds the gradient of `loss_sum / step_tokens` of this micro-batch; on DeepSpeed nothing else divides a loss.

    Args:
        engine: a DeepSpeed engine.
        loss_sum: scalar, the *sum* of the loss over this micro-batch's supervised rows.
        step_tokens: scalar, the number of supervised rows over all ranks and micro-batches of the optimizer step.

    DeepSpeed averages gradients over ranks, hence the factor world size. A mean per micro-batch would be wrong as
    soon as rows are ragged: on 2 ranks x 2 micro-batches its cosine to the true gradient was 0.68.
    """
    engine.backward(loss_sum * (world_size() / step_tokens.to(loss_sum.dtype)), scale_wrt_gas=False)
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # only counts the micro-batch


def to_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on this rank's device; pinned ones are copied while the GPU computes."""
    return tuple(tensor.to(device(), non_blocking=True) for tensor in tensors)


class NonFiniteStepError(RuntimeError):
    """A loss or gradient was inf or nan; the optimizer has not moved. `samples` are the suspect sample ids."""

    samples: Sequence[int] = ()


def suspects(sample_ids: Sequence[Tensor], losses: Sequence[Tensor]) -> list[int]:
    """Over all ranks, the samples of the micro-batches whose losses are not finite; all of the step's if none is."""
    bad = [ids for ids, loss in zip(sample_ids, losses, strict=True) if not bool(loss.isfinite().all())]
    both = gathered((torch.cat(bad).tolist() if bad else [], torch.cat(list(sample_ids)).tolist()))
    return [i for one in both for i in one[0]] or [i for one in both for i in one[1]]


def apply_step(engine: Any, loss: float, lr: float) -> float:
    """Takes the optimizer step at learning rate `lr` and returns the global gradient norm before clipping.

    Raises:
        NonFiniteStepError: `loss` or the gradient is not finite. No weight and no optimizer state has changed.
    """
    if not math.isfinite(loss):
        raise NonFiniteStepError(f"the loss is {loss}")
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    norm = None
    if not (engine.zero_optimization() or engine.bfloat16_enabled() or engine.fp16_enabled()):
        # Plain fp32 is the one mode in which DeepSpeed neither reports the norm nor skips a non-finite step.
        grads = [param.grad for param in engine.module.parameters() if param.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads, foreach=True))
        if not math.isfinite(norm):
            raise NonFiniteStepError(f"the gradient norm is {norm}")
    engine.step()
    if not engine.was_step_applied():
        raise NonFiniteStepError("the gradient is not finite")
    return norm if norm is not None else float(engine.get_global_grad_norm())


def finish_step(
    engine: Any,
    losses: Sequence[Tensor],
    sample_ids: Sequence[Tensor],
    step_tokens: Tensor,
    *,
    kd_ratio: float,
    label_weight: float,
    lr: float,
    stop: "StopSignal",
) -> tuple[dict[str, float], list[float]]:
    """Sums the losses and the votes to stop over ranks and takes the optimizer step: what follows the last backward.

    Args:
        losses: by micro-batch, [label_loss, kd_loss, ...] summed over its rows, before weights; what follows is counted.
        sample_ids: by micro-batch, for the message of a step that is not finite.
        step_tokens: scalar, supervised rows of the step over all ranks.

    Returns:
        The step's values for the log; and over all ranks the further sums of `losses`, then `step_tokens`.

    Raises:
        NonFiniteStepError: as `apply_step`, with the suspect samples.
    """
    totals = total(torch.cat([torch.stack(list(losses)).sum(0), stop.votes()]))
    # The one place of a step where the host waits for the GPU.
    label_sum, kd_sum, *sums, tokens = torch.cat([totals, step_tokens[None]]).tolist()
    further = len(sums) - len(stop.REASONS)
    stop.count(sums[further:])
    label_loss, kd_loss = label_sum / tokens, kd_sum / tokens
    loss = label_weight * label_loss + kd_ratio * kd_loss
    try:
        grad_norm = apply_step(engine, loss, lr)
    except NonFiniteStepError as error:
        error.samples = suspects(sample_ids, losses)
        raise
    values = {"loss": loss, "label_loss": label_loss, "kd_loss": kd_loss, "kd_ratio": kd_ratio}
    return values | {"label_weight": label_weight, "lr": lr, "grad_norm": grad_norm}, [*sums[:further], tokens]


def gathered_state_dict(engine: Any) -> dict[str, Tensor]:
    """The module's full state dict on the CPU, in its compute dtype; call on every rank (ZeRO-3 gathers)."""
    if engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict()
    else:
        state = engine.module.state_dict()
    return {name: tensor.detach().cpu() for name, tensor in (state or {}).items()}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(engine: Any, folder: Path, step: int, client_state: dict[str, Any], keep: int) -> None:
    """Writes `folder/step<step>`, complete or invisible, and removes all but the newest `keep`.

    DeepSpeed moves its own `latest` before the other ranks' shards are complete and never checks what it reads. Here
    the checkpoint grows in a hidden folder; a manifest of SHA-256 sums and one rename make it visible.
    """
    hidden = folder / ".incomplete"
    name = f"step{step:08d}"
    if rank() == 0:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(hidden), tag=name, client_state=client_state, save_latest=False)
    except (OSError, RuntimeError) as error:  # PyTorch's writer has no error of its own for a full disk
        reason = (str(error) or repr(error)).splitlines()[0]
        raise OSError(f"{folder / name} cannot be written: {reason}; mend that, then continue with --resume") from error
    dist.barrier()
    if rank() == 0:
        _write_manifest(hidden / name)
        shutil.rmtree(folder / name, ignore_errors=True)
        (hidden / name).rename(folder / name)
        _sync(folder)
        shutil.rmtree(hidden)
        there = sorted(path.name for path in folder.glob("step*"))
        newer = [other for other in there if step_of(other) > step]  # damaged: the run was resumed before them
        for old in newer + [other for other in there if other not in newer][:-keep]:
            shutil.rmtree(folder / old)
    dist.barrier()


def _write_manifest(folder: Path) -> None:
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            sums[str(file.relative_to(folder))] = _sha256(file)
            _sync(file)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(sums, indent=1))
    _sync(manifest)
    _sync(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Forces a file or folder onto the disk, so that a rename cannot be seen before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest_checkpoint(folder: Path) -> str | None:
    """Name of the newest checkpoint in `folder` whose manifest holds; the same on every rank.

    A damaged one is named and passed over.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    name = broadcast(_newest_sound(folder) if rank() == 0 else None)
    if name is None and any(folder.glob("step*")):
        raise ValueError(f"--resume: all checkpoints in {folder} are damaged; start a new run in another --out")
    return name


def _newest_sound(folder: Path) -> str | None:
    for candidate in sorted(folder.glob("step*"), reverse=True):
        damage = _damage(candidate)
        if not damage:
            return candidate.name
        print(f"checkpoint {candidate} is damaged ({damage}): trying an older one", file=sys.stderr, flush=True)
    return None


def _damage(checkpoint: Path) -> str:
    """What in a checkpoint is not as its manifest says; "" when it holds."""
    try:
        sums = json.loads((checkpoint / "manifest.json").read_text())
        return next((name for name, digest in sums.items() if _sha256(checkpoint / name) != digest), "")
    except (OSError, ValueError) as error:
        return str(error)


def step_of(checkpoint: str | None) -> int:
    """The number of steps taken when `checkpoint` was written; 0 without one."""
    return int(checkpoint.removeprefix("step")) if checkpoint else 0


def load_checkpoint(engine: Any, folder: Path, name: str) -> dict[str, Any]:
    """Restores weights, optimizer and the client state that `save_checkpoint` was given."""
    path, client_state = engine.load_checkpoint(str(folder), tag=name)
    assert path is not None, f"DeepSpeed did not load {folder / name}, whose manifest holds"
    return dict(client_state)


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's full state dict and the client state of a checkpoint of any ZeRO stage, without the ranks it had.

    Weights are in the compute dtype, of ZeRO-3 in float32.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    damage = _damage(checkpoint)
    if damage:
        raise ValueError(f"checkpoint {checkpoint} is damaged ({damage}); leave it out")
    sharded = sorted(checkpoint.glob("zero_pp_rank_*_model_states.pt"))
    states = torch.load(
        (sharded or [checkpoint / "mp_rank_00_model_states.pt"])[0], map_location="cpu", weights_only=False
    )
    if not sharded:
        return states["module"], states
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(None):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name), states


# --- stopping ---------------------------------------------------------------------------------------------------------


class StopSignal:
    """Why to stop, agreed by all ranks: the first SIGTERM or SIGINT of any rank, or `max_minutes` of rank 0.

    Further signals are ignored, so that the checkpoint can be written. A launcher signals its ranks one after the
    other, and a rank that saved by itself would wait for the others for ever: so the ranks' votes travel with the
    losses, in the one collective of a step that the host reads.
    """

    REASONS = ("SIGTERM", "SIGINT", "max-minutes")

    def __init__(self, max_minutes: float | None = None) -> None:
        self.agreed = ""
        self._mine = ""
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes and rank() == 0 else math.inf
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        self._mine = self._mine or signal.Signals(number).name

    def votes(self) -> Tensor:
        """float [3]: this rank's vote for each reason."""
        if time.monotonic() > self._deadline:
            self._mine = self._mine or "max-minutes"
        votes = torch.zeros(len(self.REASONS), device=device())
        if self._mine:
            votes[self.REASONS.index(self._mine)] = 1
        return votes

    def count(self, votes: Sequence[float]) -> None:
        """Takes the sum of all ranks' votes; from then on `agreed` is the reason, "" while there is none."""
        self.agreed = next((reason for reason, vote in zip(self.REASONS, votes, strict=True) if vote), "")


# --- randomness -------------------------------------------------------------------------------------------------------


def seed_step(seed: int, step: int) -> None:
    """Seeds dropout as a pure function of (seed, step, rank): a resumed run needs no saved generator."""
    mixed = hashlib.blake2b(f"{seed},{step},{rank()}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(mixed, "little"))
