"""DeepSpeed: config, engine, token-exact normalisation, one checked step.

DeepSpeed is imported inside functions: bad input is refused before those seconds are spent.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_core.system.ranks import device, gathered, world_size
from kd_core.training.flags import TrainFlags
from kd_core.training.plain import PlainEngine
from kd_core.training.processes import limit_collectives

Engine = Any  # a DeepSpeed engine or a PlainEngine

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


def load_config(cfg: TrainFlags) -> dict[str, Any]:
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
    limit_collectives()  # of the groups that DeepSpeed has made
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


def require_stage(cfg: TrainFlags, most: int, what: str) -> None:
    """Raises ValueError when --deepspeed-config has a ZeRO stage above `most`, which `what` cannot work with."""
    stage = load_config(cfg).get("zero_optimization", {}).get("stage", 0)
    if stage > most:
        raise ValueError(
            f"{what} needs ZeRO stage {most} or below, {cfg.deepspeed_config} has {stage}; choose another file"
        )


def for_backwards(config: dict[str, Any], backwards: int | None) -> dict[str, Any]:
    """The DeepSpeed config of an engine that has `backwards` backward passes a micro-batch and update; None: any number.

    DeepSpeed counts them to know the last, during which it reduces gradients; with None it reduces in the update, on ZeRO 2
    and 3 in every backward.

    Raises:
        ValueError: None and overlap_comm on a stage where DeepSpeed cannot have both.
    """
    if backwards is None:
        zero = config.get("zero_optimization", {})
        if zero.get("overlap_comm") and zero.get("stage", 0) < 2:
            raise ValueError(
                "--deepspeed-config has overlap_comm, which this recipe cannot use below ZeRO stage 2; set it to false"
            )
        return config | {"managed_gradient_accumulation": False}
    accumulation = config["gradient_accumulation_steps"] * backwards
    batch = config["train_micro_batch_size_per_gpu"] * world_size() * accumulation  # bookkeeping: it must multiply out
    return config | {"gradient_accumulation_steps": accumulation, "train_batch_size": batch}


class LoopError(RuntimeError):
    """A recipe uses the loop in a way that would train on a wrong gradient; nothing has moved."""


class NonFiniteStepError(RuntimeError):
    """A loss or gradient was inf or nan; the optimizer has not moved. `samples` are the suspect sample ids."""

    samples: Sequence[int] = ()


def suspects(sample_ids: Sequence[Tensor], losses: Sequence[Tensor]) -> list[int]:
    """Over all ranks, the samples of the micro-batches whose losses are not finite; all of the step's if none is."""
    bad = [ids for ids, loss in zip(sample_ids, losses, strict=True) if not bool(loss.isfinite().all())]
    both = gathered((torch.cat(bad).tolist() if bad else [], torch.cat(list(sample_ids)).tolist()))
    return [i for one in both for i in one[0]] or [i for one in both for i in one[1]]


def backward(engine: Engine, loss_sum: Tensor, rows: Tensor) -> None:
    """Adds the gradient of `loss_sum / rows`; nothing else divides a loss.

    Args:
        loss_sum: scalar, the *sum* of the loss over this micro-batch's supervised rows.
        rows: scalar, their number over all ranks and micro-batches of the optimizer step.

    Engines average gradients over ranks, hence the factor world size. A mean per micro-batch would be wrong as soon as rows
    are ragged: on 2 ranks x 2 micro-batches its cosine to the true gradient was 0.68.
    """
    loss = loss_sum * (world_size() / rows.to(loss_sum.dtype))
    if isinstance(engine, PlainEngine):
        engine.backward(loss)
        return
    engine.backward(loss, scale_wrt_gas=False)
    if engine.managed_gradient_accumulation() and not engine.is_gradient_accumulation_boundary():
        engine.step()  # only counts the backward


def check_backwards(engine: Engine, made: int) -> None:
    """Raises LoopError unless DeepSpeed counted on as many backward passes: it would step on a part of the gradient."""
    if isinstance(engine, PlainEngine) or not engine.managed_gradient_accumulation():
        return
    due = engine.gradient_accumulation_steps()
    if made != due:
        raise LoopError(
            f"{made} backward passes before Step.update, the engine counts on {due}: one for each micro-batch, times "
            "Run.engine(..., backwards=N); backwards=None allows any number"
        )


def update(engine: Engine, lr: float) -> float:
    """Takes the optimizer step at learning rate `lr` and returns the global gradient norm before clipping.

    Raises:
        NonFiniteStepError: the gradient is not finite. No weight and no optimizer state has changed.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    if isinstance(engine, PlainEngine):
        norm = _finite(engine.reduce())
        engine.step()
        return norm
    trained = [param for param in engine.module.parameters() if param.requires_grad]
    plain_fp32 = not (engine.zero_optimization() or engine.bfloat16_enabled() or engine.fp16_enabled())
    if plain_fp32:  # the one mode in which DeepSpeed neither reports the norm nor skips a non-finite step
        unreduced = not engine.managed_gradient_accumulation()
        for param in trained if unreduced else ():
            if param.grad is None:  # only other ranks have one
                param.grad = torch.zeros_like(param)
        grads = [param.grad for param in trained if param.grad is not None]
        for grad in grads if unreduced else ():  # DeepSpeed's own mean of equal values changes nothing then
            dist.all_reduce(grad)
            grad /= world_size()
        norm = _finite(float(torch.nn.utils.get_total_norm(grads, foreach=True)))
    engine.step()
    if not engine.was_step_applied():
        raise NonFiniteStepError("the gradient is not finite")
    return norm if plain_fp32 else float(engine.get_global_grad_norm())


def _finite(norm: float) -> float:
    if not math.isfinite(norm):
        raise NonFiniteStepError(f"the gradient norm is {norm}")
    return norm


def blame(error: NonFiniteStepError, micro_batches: Sequence[Any], losses: Sequence[Tensor]) -> NonFiniteStepError:
    """The error, with the samples whose loss is not finite; all of the step's if none is, or it cannot be told."""
    sample_ids = [micro.sample_ids for micro in micro_batches if hasattr(micro, "sample_ids")]
    if sample_ids:
        told = losses if len(losses) == len(sample_ids) else [torch.zeros(())] * len(sample_ids)
        error.samples = suspects(sample_ids, told)
    return error


@contextlib.contextmanager
def frozen(engine: Engine) -> Iterator[nn.Module]:
    """The engine's module, whose weights take no gradient within: another engine's loss may pass through its forward.

    Called as an engine, it would take that loss for its own: under ZeRO its reductions would begin, and stage 0 refuses.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield engine.module
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def gathered_state_dict(engine: Engine, part: str = "") -> dict[str, Tensor]:
    """The module's full state dict on the CPU, in its compute dtype; call on every rank (ZeRO-3 gathers).

    Args:
        part: name of a submodule, of which alone the state is wanted.

    Raises:
        LoopError: the module has no such part.
    """
    if part not in dict(engine.module.named_modules()):
        parts = ", ".join(name for name, _ in engine.module.named_children())
        raise LoopError(f"{type(engine.module).__name__} has no part {part!r}; it has {parts}")
    if not isinstance(engine, PlainEngine) and engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict()
    else:
        state = engine.module.state_dict()
    prefix = f"{part}." if part else ""
    wanted = ((name, tensor) for name, tensor in (state or {}).items() if name.startswith(prefix))
    return {name.removeprefix(prefix): tensor.detach().cpu() for name, tensor in wanted}
