"""DeepSpeed: config, engine, token-exact normalisation, one checked step.

DeepSpeed is imported inside functions: bad input is refused before those seconds are spent.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_core.system.ranks import device, gathered, total, world_size
from kd_core.training.flags import TrainFlags
from kd_core.training.stop import StopSignal

# A rank that hangs ends the run after this long. DeepSpeed's own setting covers one of its groups only.
COLLECTIVE_TIMEOUT = timedelta(minutes=15)

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
    stop: StopSignal,
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
