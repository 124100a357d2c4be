"""Pretrained models of transformers, loaded whole or not at all."""

from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import TorchAoConfig
from transformers.utils import logging

from kd_core.runs.sources import model_source

# What from_pretrained raises for files that are damaged or of something else.
UNLOADABLE = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, EOFError, UnpicklingError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip


def load_pretrained(
    model_class: Any, path: str, vocab_size: int, *, flag: str = "--teachers", seq_len: int = 0, **settings: Any
) -> Any:
    """`model_class.from_pretrained`, refusing what would silently be half a model or would run code.

    Args:
        vocab_size: tokens of the run's tokenizer, which the model must know.
        seq_len: positions of the run's samples, which it must have.
        settings: passed on; they become part of the model's config.

    Raises:
        ValueError: another architecture, missing weights, too few tokens or positions, an unreadable or unsafe file.
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
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    wrong = sorted(set(info["missing_keys"]) - tied) or sorted(name for name, *_ in info["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"{flag} {path} lacks {len(wrong)} weights of {model_class.__name__}, or has them in other shapes: {wrong[0]}"
        )
    if model.config.vocab_size < vocab_size:
        raise ValueError(f"{flag} {path} knows {model.config.vocab_size} tokens, the run's tokenizer has {vocab_size}")
    if model.config.max_position_embeddings < seq_len:
        positions = model.config.max_position_embeddings
        raise ValueError(f"{flag} {path} has {positions} positions, fewer than --seq-len {seq_len}; lower --seq-len")
    return model


def int8_weights(*, keep: Sequence[str]) -> TorchAoConfig:
    """For `load_pretrained`'s `quantization_config`: weights of linear layers in 8 bits, but for the modules `keep`."""
    from torchao.quantization import Int8WeightOnlyConfig  # here, because only int8 teachers need it

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(keep))
