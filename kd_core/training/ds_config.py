"""The DeepSpeed JSON: found, read, and checked to its last key, before DeepSpeed is asked for an engine.

DeepSpeed ignores unknown keys at the top level and in half of its sections, takes any type there, and answers for the other half
with pages of pydantic once a model is built. It is imported inside functions: what is wrong is said before those seconds.
"""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

OWNED_BY_RECIPE = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size and --micro-batch-size",
    "gradient_clipping": "--clip",
    "optimizer": "--lr and its neighbours",
    "scheduler": "--lr and --warmup-fraction",
    "steps_per_print": "--log-every",
}

# What DeepSpeed 0.19 reads without a check of its own and a recipe leaves to the file: keys and their types.
UNCHECKED: dict[str, Any] = {
    "communication_data_type": str, "zero_allow_untested_optimizer": bool, "zero_force_ds_cpu_optimizer": bool,
    "prescale_gradients": bool, "gradient_predivide_factor": float, "wall_clock_breakdown": bool, "memory_breakdown": bool,
    "dump_state": bool, "disable_allgather": bool, "disable_python_gc": bool,
    "activation_checkpointing": {
        "partition_activations": bool, "number_checkpoints": int, "contiguous_memory_optimization": bool,
        "synchronize_checkpoint_boundary": bool, "profile": bool, "cpu_checkpointing": bool,
    },
    "aio": {
        "block_size": int, "queue_depth": int, "intra_op_parallelism": int, "single_submit": bool, "overlap_events": bool,
        "use_gds": bool,
    },
    "checkpoint": {
        "tag_validation": str, "load_universal": bool, "use_node_local_storage": bool,
        "parallel_write": {"pipeline_stage": bool}, "checkpoint_serialization": bool, "writer": dict,
    },
    "data_types": {"grad_accum_dtype": str, "param_dtype": str, "buffer_dtype": str, "keep_in_fp32_modules": (str, list)},
    "flops_profiler": {
        "enabled": bool, "recompute_fwd_factor": float, "profile_step": int, "module_depth": int, "top_modules": int,
        "detailed": bool, "output_file": str,
    },
    "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list},
}  # fmt: skip
WANTED: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "an object",
}  # fmt: skip
MONITORS = {"wandb": "wandb", "comet": "comet_ml"}  # sections, and packages that are no dependencies


def find_config(path: str, flag: str = "--deepspeed-config") -> Path:
    """The DeepSpeed JSON `path`: as given, or in `ds_configs/` beside `kd_core/`."""
    root = Path(__file__).resolve().parents[2]
    for candidate in (Path(path), root / path, root / "ds_configs" / path):
        if candidate.is_file():
            return candidate
    available = sorted(file.name for file in (root / "ds_configs").glob("*.json"))
    raise FileNotFoundError(f"{flag} {path} does not exist; give a JSON file or one of {available}")


def read_config(path: str, flag: str = "--deepspeed-config") -> dict[str, Any]:
    """What the file `path` sets; null stands for DeepSpeed's default, true and false for a section that is enabled or not.

    Raises:
        ValueError: malformed JSON, an unknown key, a value that DeepSpeed would not take, a key that the recipe owns, "auto".
    """
    file = find_config(path, flag)
    what = f"{flag} {file}"

    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{what} has {twice[0]!r} twice; remove one")
        return {key: value for key, value in pairs if value is not None}

    def constant(name: str) -> None:
        raise ValueError(f"{what} has the value {name[:20]}, which is no finite number; correct it")

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            constant(text)
        return value

    def whole(text: str) -> int:
        finite(text)
        return int(text)

    try:
        config = json.loads(
            file.read_text(encoding="utf-8-sig"),
            object_pairs_hook=entries, parse_constant=constant, parse_float=finite, parse_int=whole,
        )  # fmt: skip
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{what} must hold a JSON object, got {type(config).__name__}")
    for key, owner in OWNED_BY_RECIPE.items():
        if key in config:
            raise ValueError(f"{what} sets {key!r}, which {owner} sets; remove it from the file")
    if '"auto"' in json.dumps(config):
        raise ValueError(f'{what} has the value "auto", which only Hugging Face\'s Trainer fills in')
    config = _section(config, UNCHECKED | _checked_by_deepspeed(), what, "")
    _check_together(config, what)
    return config


def _checked_by_deepspeed() -> dict[str, Any]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor import config as monitors
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig, "compile": CompileConfig, "tensorboard": monitors.TensorBoardConfig,
        "wandb": monitors.WandbConfig, "csv_monitor": monitors.CSVConfig, "comet": monitors.CometConfig,
    }  # fmt: skip


def _section(value: Any, known: Any, what: str, name: str) -> dict[str, Any]:
    """The section `value`, with what stands for it turned into objects; `known` is its keys with their types, or its class."""
    keys = known if isinstance(known, dict) else known.model_fields
    if isinstance(value, bool) and "enabled" in keys:
        value = {"enabled": value}
    if isinstance(value, bool) and name == "zero_optimization":
        value = {"stage": int(value)}  # as DeepSpeed has it
    if isinstance(value, dict) and name == "zero_optimization":
        value = {key: entry for key, entry in value.items() if entry is not False or not key.startswith("offload_")}
    if not isinstance(value, dict):
        raise ValueError(f"{what}: {name!r} must be an object, got {json.dumps(value)}")
    below = f"{name}." if name else ""
    aliases = set() if isinstance(known, dict) else {field.alias for field in keys.values()}
    if unknown := sorted(f"{below}{key}" for key in set(value) - set(keys) - aliases):
        raise ValueError(f"{what} has unknown keys {unknown}; correct or remove them")
    if not isinstance(known, dict):
        return _validated(value, known, what, name)
    checked = {}
    for key, entry in value.items():
        kind = known[key]
        if isinstance(kind, dict) or hasattr(kind, "model_fields"):
            checked[key] = _section(entry, kind, what, below + key)
            continue
        checked[key] = entry
        number = (int, float) if kind is float else kind
        if not isinstance(entry, number) or isinstance(entry, bool) != (kind is bool):
            raise ValueError(f"{what}: {below}{key} must be {WANTED.get(kind, 'a list')}, got {json.dumps(entry)}")
    return checked


def _validated(value: dict[str, Any], section: Any, what: str, name: str) -> dict[str, Any]:
    """`value` as DeepSpeed's own class accepts it."""
    from pydantic import ValidationError

    stage = value.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ValueError(f"{what}: {name}.stage must be 0, 1, 2 or 3, got {json.dumps(stage)}")
    try:
        made = section(**value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([name, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{what} has unknown keys [{place!r}]; correct or remove them") from None
        given = f", got {json.dumps(first['input'], default=str)}" if first["loc"] else ""
        reason = "must be an object" if first["type"] == "model_type" else first["msg"].replace("Input should", "must")
        for prefix in ("Assertion failed, ", "Value error, "):
            reason = reason.removeprefix(prefix)
        raise ValueError(f"{what}: {place} {reason}{given}") from None
    except AssertionError as error:  # of keys that DeepSpeed has renamed
        raise ValueError(f"{what}: {name}: {error}") from None
    return value | ({"enabled": made.enabled} if "enabled" in value else {})


def _check_together(config: dict[str, Any], what: str) -> None:
    """What no section can say by itself."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    if config.get("fp16", {}).get("enabled"):
        raise ValueError(f"{what} enables fp16, whose loss scaling skips steps; use bf16")
    if config.get("zero_force_ds_cpu_optimizer"):
        raise ValueError(
            f"{what}: zero_force_ds_cpu_optimizer must be false, because recipes bring their own optimizer"
        )
    zero = config.get("zero_optimization", {})
    if not zero.get("compute_grad_norm", True):
        raise ValueError(
            f"{what}: zero_optimization.compute_grad_norm must be true, because every step is checked by its norm"
        )
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = zero.get(key, {}).get("device", "none")
        if device != "none" and zero.get("stage", 0) < least:
            raise ValueError(
                f"{what}: zero_optimization.{key} needs stage {least} or above, got {zero.get('stage', 0)}; raise the stage, "
                "or remove it"
            )
        if device == "nvme" and not zero[key].get("nvme_path"):
            raise ValueError(f"{what}: zero_optimization.{key} to nvme needs nvme_path, a folder on the drive")
    for monitor, package in MONITORS.items():
        if config.get(monitor, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{what} enables {monitor}, but the package {package} is not installed; pip install {package}, or remove it"
            )
    try:
        DeepSpeedConfig(config | {"train_micro_batch_size_per_gpu": 1})
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        raise ValueError(f"{what}: {error}") from None
