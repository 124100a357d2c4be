"""Causal language models of transformers with a head at given positions only: built, loaded, evaluated, exported.

Shape letters: B rows, T positions, N supervised positions (indices into B * T), V vocabulary, D width.
"""

import contextlib
import copy
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from kd_core.kernels.linear_softmax_kl import Side
from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.losses import linear
from kd_core.losses.calibration import BINS, calibration_error, calibration_sums
from kd_core.losses.distillation import Ensemble, mean_teacher_logits
from kd_core.losses.divergences import total_variation
from kd_core.system.files import replace_folder
from kd_core.system.ranks import device, rank, total
from kd_core.text import varlen
from kd_core.text.causal_tokenizer import token_bytes, vocabulary_size
from kd_core.text.pretrained import load_pretrained, teacher_settings
from kd_core.text.probes import require_head, require_isolation
from kd_core.training.engine import Engine, gathered_state_dict
from kd_core.training.stop import interruptible

disable_progress_bar()  # Hugging Face's, for files that load in a moment


def _shape(layers: int, width: int, heads: int, kv_heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return dict(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, **more,
    )  # fmt: skip


# Llama-shaped models as published: SmolLM2 (Allal et al. 2025, arXiv 2502.02737), Llama 3.2 and 3.1 (arXiv 2407.21783).
TIED: dict[str, Any] = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}
SIZES = {
    "135M": _shape(30, 576, 9, 3, 1536, rope_theta=1e5, **TIED),
    "360M": _shape(32, 960, 15, 5, 2560, rope_theta=1e5, **TIED),
    "1B": _shape(16, 2048, 32, 8, 8192, rope_theta=5e5, **TIED),
    "3B": _shape(28, 3072, 24, 8, 8192, rope_theta=5e5, **TIED),
    "8B": _shape(32, 4096, 32, 8, 14336, rope_theta=5e5, rms_norm_eps=1e-5),
}
HEAD_WIDTH = 64


def size_of(name: str) -> dict[str, Any] | None:
    """Fields of a LlamaConfig, of a name in SIZES or of LAYERSxWIDTH; None for a checkpoint."""
    if grid := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
        layers, width = int(grid[1]), int(grid[2])
        heads, inner = max(1, width // HEAD_WIDTH), 64 * math.ceil(width / 24)  # about 8/3 of the width
        return _shape(layers, width, heads, heads, inner, **TIED)
    return SIZES.get(name)


class CausalLM(nn.Module):
    """A causal language model that computes vocabulary logits at given positions only: the full [B, T, V] exist nowhere.

    No document sees another: positions restart at each, no cache is made, and packed rows have no mask. With a cache, which
    is transformers' default in training too, position ids that restart would not be looked at.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.logit_scale, self.softcap = logit_shape(lm.config.get_text_config())

    @property
    def head(self) -> Any:
        """The linear layer that makes the logits."""
        return self.lm.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        *teacher_and_labels: Any,
        head: bool = True,
        **method: Any,
    ) -> Any:
        """input_ids [B, T], position_ids [B, T], positions [N] -> logits [N, V]; losses, given what they need; or the head's input.

        Args:
            attention_mask: [B, T], 1 for a token, of padded rows; None of packed ones.
            teacher_and_labels: a `Side` or None, and labels [N]; with `method`, of `linear_distillation_sum`.
        """
        bounds = varlen.documents(position_ids) if varlen.has(self.lm) else {}
        hidden = self.lm.base_model(
            input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False, **bounds
        ).last_hidden_state
        hidden_ND = hidden.flatten(0, 1)[positions]
        if not head:
            return hidden_ND
        if teacher_and_labels:
            shape = {"logit_scale": self.logit_scale, "softcap": self.softcap}
            return self.head(hidden_ND, *teacher_and_labels, **shape, **method)
        logits_NV = self.head(hidden_ND) * self.logit_scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)

    def side(self, hidden_ND: Tensor) -> Side:
        """What makes logits of the head's input."""
        return Side(hidden_ND, self.head.weight, self.head.bias, self.logit_scale, self.softcap)


def logit_shape(config: Any) -> tuple[float, float | None]:
    """Factor of the logits and their tanh soft cap, as configs of transformers name them; `probes.require_head` proves it."""
    scale = (
        getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    )  # Cohere, Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return float(scale), float(softcap) if softcap else None


def head_and_input(teacher: Any, micro: Any) -> Side:
    """What the losses need of a teacher."""
    side: Side = teacher.side(teacher(*micro.inputs, head=False))
    return side


def build(cfg: Any, tokenizer: Any) -> CausalLM:
    """A randomly initialised Llama of one of its sizes, or a checkpoint's model; its vocabulary padded to a multiple of 64.

    Args:
        cfg: `CausalTextFlags` with `student`, `seed` and `gradient_checkpointing`.

    Raises:
        ValueError: as `load_pretrained` and `probes`.
    """
    padded = math.ceil(vocabulary_size(tokenizer) / 64) * 64
    torch.manual_seed(cfg.seed)
    if size := size_of(cfg.student):
        special = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = AutoConfig.for_model(
            "llama", vocab_size=padded, max_position_embeddings=cfg.seq_len, **size, **special
        )
        lm = AutoModelForCausalLM.from_config(config)
    else:
        settings = {"flag": "--student", "seq_len": cfg.seq_len, "dtype": torch.float32}
        lm = load_pretrained(AutoModelForCausalLM, cfg.student, vocabulary_size(tokenizer), **settings)
        lm.resize_token_embeddings(padded, mean_resizing=False)
    model = _tried(CausalLM(lm), f"--student {cfg.student}", cfg)
    if cfg.attention == varlen.NAME:  # refuses what a model has in training alone before a run begins
        token = torch.zeros(1, 1, dtype=torch.int64)
        model.train()(token, token, None, token[0], head=False)
    model.head.__class__ = linear.LossHead  # the same linear layer, able to give losses
    if cfg.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_teacher(cfg: Any, columns: int, path: str) -> CausalLM:
    """The model of `path` of --teachers, of at least `columns` tokens, on the CPU; errors as `build`.

    Args:
        cfg: `CausalTextFlags` with `teacher_dtype`.
    """
    settings = teacher_settings(cfg.teacher_dtype)
    lm = load_pretrained(AutoModelForCausalLM, path, columns, seq_len=cfg.seq_len, **settings)
    return _tried(CausalLM(lm), f"--teachers {path}", cfg)


def _tried(model: CausalLM, what: str, cfg: Any) -> CausalLM:
    require_head(model, what)
    if cfg.attention == varlen.NAME:
        varlen.give(model.lm, what)
    if cfg.packing:
        require_isolation(model, what)
    return model


# ------------------------------------------------------------------------------------------------------------ evaluated


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    batches: Iterable[Any],
    *,
    columns: int,
    teachers: Sequence[CausalLM] = (),
    ensemble: Ensemble = "probabilities",
) -> dict[str, float]:
    """Loss (nats a token), perplexity, bits per byte, accuracy of the next token and calibration error, over all ranks.

    Bits per byte compare models of different tokenizers; the end of a text counts in the loss and has no bytes. Beside teachers also the divergence from the mean of them, KL(teacher ||
    student) in nats a token; how often the most probable token is theirs; and 1 - total variation, the expected share of
    its tokens that speculative decoding accepts with the student as the draft of the teacher (Leviathan et al. 2022,
    arXiv 2211.17192). Temperature is 1. The logits are made and used a chunk of rows at a time.

    Args:
        model: a `CausalLM`, or an engine around one; it is left in evaluation.
        batches: this rank's; all ranks have as many.
        columns: V, that mean something.
    """
    model.eval()
    bytes_V = torch.from_numpy(token_bytes(tokenizer)).to(device())
    sums = torch.zeros(7 + 2 * BINS, device=device(), dtype=total(0.0).dtype)
    for micro in interruptible(batches):
        micro = micro.to(device())
        targets = micro.targets
        hidden = [one(*micro.inputs, head=False) for one in (model, *teachers)]
        with whole_head(model) as student:
            sides = [one.side(hidden_ND) for one, hidden_ND in zip((student, *teachers), hidden, strict=True)]
            size = linear.chunk_rows(columns, linear.CHUNKED_COPIES, device().type == "cuda")
            for start in range(0, len(targets), size):
                rows = slice(start, start + size)
                logits_CV, *theirs = (
                    linear.logits(side._replace(hidden_ND=side.hidden_ND[rows]), columns) for side in sides
                )
                mean_CV = mean_teacher_logits(theirs, 1.0, ensemble) if theirs else None
                sums += _sums(logits_CV, mean_CV, targets[rows], bytes_V)
    tokens, loss, hits, text_bytes, kl, agreement, distance, *bins = total(sums).tolist()
    scores = {
        "eval/loss": loss / tokens,
        "eval/perplexity": math.exp(min(loss / tokens, 80.0)),
        "eval/bits_per_byte": loss / math.log(2) / max(1.0, text_bytes),
        "eval/accuracy": hits / tokens,
        "eval/calibration_error": calibration_error(bins, tokens),
    }
    if teachers:
        of_teachers = {"eval/kl": kl, "eval/agreement": agreement, "eval/acceptance": tokens - distance}
        scores |= {name: value / tokens for name, value in of_teachers.items()}
    return scores


def _sums(logits_CV: Tensor, teacher_CV: Tensor | None, labels_C: Tensor, bytes_V: Tensor) -> Tensor:
    kl_C, label_C = softmax_kl(logits_CV, teacher_CV, labels_C)
    confidence_C, top_C = logits_CV.softmax(-1).max(-1)
    hit_C = (top_C == labels_C).float()
    agreement = distance = kl_C.new_zeros(())
    if teacher_CV is not None:
        agreement = (top_C == teacher_CV.argmax(-1)).sum()
        distance = total_variation(logits_CV, teacher_CV).sum()
    tokens = kl_C.new_tensor(float(len(labels_C)))
    parts = [tokens, label_C.sum(), hit_C.sum(), bytes_V[labels_C].sum(), kl_C.sum(), agreement, distance]
    return torch.cat([torch.stack([part.float() for part in parts]), calibration_sums(confidence_C, hit_C)])


@contextlib.contextmanager
def whole_head(model: Any) -> Iterator[CausalLM]:
    """The module of an engine, or the model itself, with its head's weights whole on this rank; not around a forward."""
    module: CausalLM = getattr(model, "module", model)
    if not hasattr(module.head.weight, "ds_id"):
        yield module
        return
    import deepspeed  # imported here, as all over the project, because it takes seconds

    with deepspeed.zero.GatheredParameters(list(module.head.parameters())):
        yield module


# ------------------------------------------------------------------------------------------------------------- exported


def export(student: Engine, tokenizer: Any, folder: Path) -> None:
    """Writes `folder`: the student alone, cropped to the tokenizer's vocabulary, its generation config, and the tokenizer with
    its chat template; call on every rank."""
    state = gathered_state_dict(student, "lm")
    if rank() == 0:
        lm = student.module.lm
        plain: Any = type(lm)(copy.deepcopy(lm.config))
        plain.to(next(iter(state.values())).dtype).load_state_dict(state)
        plain.resize_token_embeddings(vocabulary_size(tokenizer), mean_resizing=False)
        plain.generation_config = copy.deepcopy(lm.generation_config)
        replace_folder(folder, plain.save_pretrained, tokenizer.save_pretrained)
