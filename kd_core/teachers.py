"""The teachers of a run: where they come from, how they are frozen, and how their memory is given back."""

import ctypes
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kd_core.losses import mean_teacher_logits

# Files that from_pretrained reads without running code: safetensors, or pickles restricted to tensors.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def model_source(path: str, flag: str = "--teachers") -> str:
    """What `from_pretrained` takes for `path`: a run folder's `hf/`, a Hugging Face folder, or a hub name.

    Raises:
        FileNotFoundError: `path` looks like a path and nothing is there.
        ValueError: a folder that is neither a finished run nor a Hugging Face model.
    """
    folder = Path(path)
    if folder.is_dir():
        if (folder / "run.json").exists():
            if not (folder / "hf" / "config.json").exists():
                raise ValueError(f"{flag} {path} is a run without hf/: it has not finished; continue it with --resume")
            folder = folder / "hf"
        if not (folder / "config.json").exists() or not any((folder / name).exists() for name in WEIGHT_FILES):
            raise ValueError(f"{flag} {path} is no model: expected a run folder, or config.json with model.safetensors")
        return str(folder)
    if folder.exists() or path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1:
        raise FileNotFoundError(
            f"{flag} {path}: no model folder there; give a run folder, a model folder or a hub name"
        )
    return path


def load_pretrained(model_class: Any, path: str, vocab_size: int, *, flag: str = "--teachers", **settings: Any) -> Any:
    """`model_class.from_pretrained`, refusing what would silently be half a model or would run code.

    Args:
        vocab_size: tokens of the run's tokenizer, which the model must know.
        settings: passed on; they become part of the model's config.

    Raises:
        ValueError: another architecture, missing weights, too small a vocabulary, an unreadable or unsafe weight file.
    """
    source = model_source(path, flag)
    try:
        model, info = model_class.from_pretrained(source, output_loading_info=True, trust_remote_code=False, **settings)
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{flag} {path} cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}") from error
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing or info["mismatched_keys"]:
        raise ValueError(f"{flag} {path} lacks weights of {model_class.__name__}: {missing or info['mismatched_keys']}")
    if model.config.vocab_size < vocab_size:
        raise ValueError(f"{flag} {path} knows {model.config.vocab_size} tokens, the run's tokenizer has {vocab_size}")
    return model


class TeacherPool:
    """Frozen teachers, never in an optimizer or a checkpoint, and released when the window closes.

    Args:
        names: what the log calls them.
        models: modules in the same order; frozen and set to evaluation here.
        columns: V, the columns of their logits that mean something; None for all.
        compiled: whether their forwards go through torch.compile.
    """

    def __init__(
        self, names: Sequence[str], models: Sequence[nn.Module], *, columns: int | None = None, compiled: bool = False
    ) -> None:
        self.names, self.columns = tuple(names), columns
        self.models = [model.eval().requires_grad_(False) for model in models]
        for model in self.models if compiled else ():
            model.compile()

    def __len__(self) -> int:
        return len(self.models)

    @torch.no_grad()
    def logits(self, drawn: Sequence[int], inputs: tuple[Tensor, ...], temperature: float) -> Tensor:
        """[N, V] logits of the drawn teachers, the mean of their probabilities at `temperature` when several."""
        return mean_teacher_logits([self.models[index](*inputs)[:, : self.columns] for index in drawn], temperature)

    def release(self) -> None:
        """Gives the teachers' memory back to the device and, on a CPU, to the operating system."""
        self.models.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory otherwise
            if trim is not None:
                trim(0)
