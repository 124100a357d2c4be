"""Pretrained models of transformers, loaded whole or not at all."""

import re
from importlib.util import find_spec
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import TorchAoConfig
from transformers.utils import logging

from kd_core.runs.sources import model_source
from kd_core.training.ds_config import read_config

# What from_pretrained raises for files that are damaged or of something else.
UNLOADABLE = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, EOFError, UnpicklingError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
# Weights of a file that other tasks have beside BERT, and buffers that older versions saved.
OTHER_HEADS = r"^(bert\.)?pooler\.|^cls\.seq_relationship\.|\.(position_ids|masked_bias)$"


def load_pretrained(
    model_class: Any, path: str, vocab_size: int, *, flag: str = "--teachers", seq_len: int = 0, **settings: Any
) -> Any:
    """`model_class.from_pretrained`, refusing what would silently be half a model or would run code.

    Args:
        vocab_size: tokens of the run's tokenizer, which the model must know.
        seq_len: positions of the run's samples, which it must have.
        settings: passed on; they become part of the model's config.

    Raises:
        ValueError: another architecture, weights that are missing or too many, too few tokens or positions, an unreadable or unsafe file.
    """
    source = model_source(path, flag)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what its table of weights says is said below in one line
    try:
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True, **settings
        )
    except UNLOADABLE as error:
        reason = " ".join((str(error) or repr(error)).split())[:200]
        raise ValueError(f"{flag} {path} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    config = model.config.get_text_config()
    tied = (
        tuple(getattr(model, "_tied_weights_keys", None) or ()) if getattr(config, "tie_word_embeddings", False) else ()
    )
    require_all_weights(info, f"{flag} {path}", model_class, fresh=tied)
    if config.vocab_size < vocab_size:
        raise ValueError(f"{flag} {path} knows {config.vocab_size} tokens, the run's tokenizer has {vocab_size}")
    positions = getattr(config, "max_position_embeddings", seq_len)  # none where positions have no end
    if positions < seq_len:
        raise ValueError(f"{flag} {path} has {positions} positions, fewer than --seq-len {seq_len}; lower --seq-len")
    model.read_from = source  # by which the loop knows what a network began with
    return model


def require_all_weights(
    info: dict[str, Any], what: str, model_class: Any, *, fresh: tuple[str, ...] = (), beside: str = OTHER_HEADS
) -> None:
    """Refuses a file that is not the model whole, nor less than the model.

    Args:
        info: what `from_pretrained` says of the loading.
        fresh: beginnings of the names that the file may lack.
        beside: pattern of the names that it may have besides.

    Raises:
        ValueError: naming the first weight that is missing, of another shape, or taken by nothing: of a layer that the config
            leaves out, or of a kind that the class does not compute.
    """
    lacking = sorted(name for name in info["missing_keys"] if not name.startswith(fresh))
    lacking = lacking or sorted(name for name, *_ in info["mismatched_keys"] if not name.startswith(fresh))
    if lacking:
        raise ValueError(
            f"{what} lacks {len(lacking)} weights of {model_class.__name__}, or has them in other shapes: {lacking[0]}"
        )
    if taken_by_nothing := sorted(name for name in info["unexpected_keys"] if not re.search(beside, name)):
        raise ValueError(
            f"{what} has {len(taken_by_nothing)} weights that {model_class.__name__} with its config.json does not take: "
            f"{taken_by_nothing[0]}; correct the config, or give a model of this class"
        )


def check_int8(cfg: Any) -> None:
    """Refuses teachers in int8 where they cannot be, of a Config with `teacher_dtype` and `TeacherFlags`."""
    if cfg.teacher_dtype == "int8":
        cfg.check("teacher_dtype", bool(find_spec("torchao")), "bf16 or fp32 without torchao, pip install torchao")
        movable = cfg.teacher_placement in ("device", "sharded")
        cfg.check("teacher_placement", movable, "device or sharded for teachers in int8")
        # At stage 3 DeepSpeed's own linear layer replaces PyTorch's in the whole process; it takes no weights of 8 bits.
        zero = read_config(cfg.deepspeed_config).get("zero_optimization", {})
        taken = zero.get("stage") != 3 or zero.get("memory_efficient_linear") is False
        what = 'bf16 or fp32 with ZeRO stage 3, unless zero_optimization has "memory_efficient_linear": false'
        cfg.check("teacher_dtype", taken, what)


def teacher_settings(dtype: str, *, keep: list[str] | None = None) -> dict[str, Any]:
    """For `load_pretrained`, of a --teacher-dtype; int8: weights of linear layers in 8 bits, but for the modules `keep`, by
    default the head's."""
    settings: dict[str, Any] = {"dtype": torch.float32 if dtype == "fp32" else torch.bfloat16}
    if dtype == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # here, because only int8 teachers need it

        settings["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)
    return settings
