"""DeepSpeed: engine, token-exact normalisation, one checked step.

DeepSpeed is imported inside functions: bad input is refused before those seconds are spent.
"""

import contextlib
import io
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_core.system.ranks import device, gathered, world_size
from kd_core.training.ds_config import read_config
from kd_core.training.flags import TrainFlags
from kd_core.training.plain import PlainEngine
from kd_core.training.processes import limit_collectives

Engine = Any  # a DeepSpeed engine or a PlainEngine

# Of every engine: no lines of DeepSpeed's own, and offloading with the recipe's optimizer instead of DeepSpeed's.
ALWAYS = {"steps_per_print": 10**9, "zero_force_ds_cpu_optimizer": False}


def load_config(cfg: TrainFlags) -> dict[str, Any]:
    """The DeepSpeed config of `--deepspeed-config` plus what the recipe owns: batch sizes, accumulation, clipping.

    Raises:
        ValueError: as `read_config`, or a batch that does not split.
    """
    config = read_config(cfg.deepspeed_config)
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
        **ALWAYS,
    }


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any], what: str = "--deepspeed-config"
) -> Any:
    """A DeepSpeed engine around `model`, with every process group given a finite timeout.

    Raises:
        ValueError: DeepSpeed cannot do what the config, named by `what`, asks of it here.
    """
    import deepspeed

    with _refusals(what):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    limit_collectives()  # of the groups that DeepSpeed has made
    return engine


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Keeps what DeepSpeed prints to itself; when it fails, shows that, and turns what it raises into one line."""
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    said = io.StringIO()
    try:
        with contextlib.nullcontext() if os.environ.get("KD_VERBOSE") else contextlib.redirect_stdout(said):
            yield
    except BaseException as error:
        sys.stderr.write(said.getvalue())
        refusals = (ValueError, AssertionError, ImportError, RuntimeError, DeepSpeedConfigError, ZeRORuntimeException)
        if isinstance(error, torch.OutOfMemoryError | LoopError) or not isinstance(error, refusals):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"DeepSpeed fails on {what} ({reason}); change it, or see where with KD_VERBOSE=1") from error


def split_by_zero3(model: nn.Module, path: str) -> Any:
    """A ZeRO-3 engine around a frozen model, by its own config `path`: each rank holds its share of every weight.

    A forward gathers weights as it goes, so all ranks must take it together.

    Args:
        model: on the CPU, where each rank reads it whole.

    Raises:
        ValueError: as `load_config`, naming --teacher-deepspeed-config; or not stage 3, or another precision.
    """
    import deepspeed

    what = f"--teacher-deepspeed-config {path}"
    config = read_config(path, "--teacher-deepspeed-config")
    stage, bf16 = config.get("zero_optimization", {}).get("stage"), config.get("bf16", {}).get("enabled", False)
    if stage != 3:
        raise ValueError(f"{what} must have zero_optimization.stage 3, got {stage}")
    dtype = next(model.parameters()).dtype
    if bf16 != (dtype == torch.bfloat16):
        raise ValueError(
            f"{what} has bf16 {'on' if bf16 else 'off'}, but the teacher is {dtype}; choose --teacher-dtype accordingly"
        )
    config |= {"train_batch_size": world_size(), "train_micro_batch_size_per_gpu": 1, **ALWAYS}
    # DeepSpeed's own linear layer would replace PyTorch's in the whole process, so in the student too.
    config["zero_optimization"] |= {"memory_efficient_linear": False}
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device())  # ZeRO-3 sees to parameters only
    with _refusals(what):
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    return initialize(model, None, config, what)


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
        rows: scalar, their number over all ranks and micro-batches of the optimizer step; without any, the loss is 0.

    Engines average gradients over ranks, hence the factor world size. A mean per micro-batch would be wrong as soon as rows
    are ragged: on 2 ranks x 2 micro-batches its cosine to the true gradient was 0.68.
    """
    loss = loss_sum * (world_size() / rows.clamp(min=1).to(loss_sum.dtype))
    if isinstance(engine, PlainEngine):
        engine.backward(loss)
        return
    engine.backward(loss, scale_wrt_gas=False)
    if engine.managed_gradient_accumulation() and not engine.is_gradient_accumulation_boundary():
        engine.step()  # only counts the backward


def due_backwards(engine: Engine) -> int | None:
    """How many backward passes DeepSpeed counts on in an update; None: any number."""
    if isinstance(engine, PlainEngine) or not engine.managed_gradient_accumulation():
        return None
    return int(engine.gradient_accumulation_steps())


def check_backwards(engine: Engine, made: int) -> None:
    """Raises LoopError unless DeepSpeed counted on as many backward passes: it would step on a part of the gradient."""
    due = due_backwards(engine)
    if due is not None and made != due:
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
