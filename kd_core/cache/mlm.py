"""Cached answers for masked language modelling: the teacher's final hidden states at masked positions, or its top k.

A record holds the K supervised positions of one row of the corpus under one pattern of masks. Hidden states are smaller
than logits (2 D bytes a position in bf16) and as exact: the teacher's head, which is kept beside them, makes the logits
when they are asked for.

The masks follow from the cache's own seed, and epoch e of a run uses pattern e mod M: so every --seed can share them.

Shapes: B rows, K supervised positions of a row, N = B K, D width, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM
from transformers.models.bert.modeling_bert import BertOnlyMLMHead
from transformers.utils.logging import disable_progress_bar

from kd_core.cache import logits, records
from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.runs.sources import model_source
from kd_core.system import ranks
from kd_core.system.checked import DamagedError
from kd_core.system.digests import weights_digest
from kd_core.system.terminal import one_line
from kd_core.teachers.sources import cache_folder, counted
from kd_core.text import bert, counts
from kd_core.text.corpus import IGNORE_INDEX, Corpus, prepare
from kd_core.text.flags import MaskingFlags
from kd_core.text.masking import MicroBatch, masked_micro_batches, validation_batches
from kd_core.text.order import sample_id
from kd_core.text.pretrained import UNLOADABLE, load_pretrained
from kd_core.text.tokenizer import require_same_tokenizer, tokenizer_digest
from kd_core.training.processes import join


@dataclass(frozen=True)
class BuildFlags(logits.BuildFlags, MaskingFlags):
    """Computes a teacher's answers for every row of a corpus once. What was killed is continued by the same command."""

    GROUP: ClassVar[str] = "cache"
    mask_patterns: int = 4
    """Different masks of each row: epoch e of a run uses pattern e mod this."""
    mask_seed: int = 17
    """Of the masks."""

    AGREE = ("seq_len", "mask_fraction", "teacher_dtype")
    SHARED = ("mask_seed", "mask_patterns")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("mask_patterns", self.mask_patterns >= 1, "at least 1")
        self.check("mask_seed", self.mask_seed >= 0, "at least 0")
        self.check("data", self.data != "c4", "data that a disk can hold every answer of")


# --- building ---------------------------------------------------------------------------------------------------------


def build(flags: BuildFlags) -> None:
    """Fills `--out` with the answers of `--teacher`; joins the process group.

    Raises:
        FileNotFoundError, ValueError: as `corpus.prepare`, `pretrained.load_pretrained` and `records.build`.
    """
    disable_progress_bar()  # Hugging Face's, for files that load in a moment
    corpus = join(
        lambda: prepare(
            flags.data, tokenizer=flags.tokenizer, vocab_size=flags.vocab_size, seq_len=flags.seq_len,
            progress=ranks.rank() == 0,
        )
    )  # fmt: skip
    source = model_source(flags.teacher, "--teacher")
    require_same_tokenizer(corpus.tokenizer, source, flag="--teacher")
    columns, dtype = len(corpus.tokenizer), logits.DTYPES[flags.teacher_dtype]
    flags.check("top_k", flags.top_k < columns, f"below the size of the vocabulary, {columns}")
    model = load_pretrained(
        BertForMaskedLM, flags.teacher, columns, flag="--teacher", seq_len=flags.seq_len, dtype=dtype
    )
    model.eval().requires_grad_(False)
    settings = {
        "kind": "mlm",
        "teacher": flags.teacher,
        "weights": weights_digest(model),
        "tokenizer": tokenizer_digest(corpus.tokenizer),
        "data": corpus.fingerprint,
        **flags.settings,
    }
    fields = flags.fields("hidden", round(flags.mask_fraction * flags.seq_len), model.config.hidden_size)
    layout = records.Layout(fields, len(corpus.rows(0)), flags.mask_patterns, flags.micro_batch_size)
    model.to(ranks.device())

    def companions(folder: Path) -> None:
        model.config.save_pretrained(folder)
        head = {name: tensor.detach().cpu().clone() for name, tensor in model.cls.state_dict().items()}
        save_file(head, folder / "head.safetensors")

    def answer(indices: range) -> np.ndarray:
        return layout.pack(indices, _answers(flags, corpus, model, layout.batches(indices)))

    records.build(
        Path(flags.out), settings, layout, answer, companions, functools.partial(_score, flags, corpus, model)
    )


@torch.no_grad()
def _answers(
    flags: BuildFlags, corpus: Corpus, model: Any, batches: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Iterator[dict[str, Tensor]]:
    for rows_B, patterns_B in batches:
        (micro,) = masked_micro_batches(
            corpus.rows(0)[rows_B], sample_id(np.zeros_like(rows_B), rows_B), micro_batch_size=len(rows_B),
            seed=flags.mask_seed, epoch=patterns_B, fraction=flags.mask_fraction, tokenizer=corpus.tokenizer,
        )  # fmt: skip
        hidden_ND = _hidden(model, micro.to(ranks.device()))
        if flags.top_k:
            logits_NV = model.cls(hidden_ND)[:, : len(corpus.tokenizer)]
            yield logits.top_k(logits_NV, flags.top_k, flags.temperatures)
        else:
            yield {"hidden": hidden_ND}


def _hidden(model: Any, micro: MicroBatch) -> Tensor:
    return model.bert(micro.input_ids).last_hidden_state.flatten(0, 1)[micro.positions]


@torch.no_grad()
def _score(flags: BuildFlags, corpus: Corpus, model: Any) -> dict[str, float]:
    """The teacher's validation loss, as the recipe measures it."""
    sums = torch.zeros(2, device=ranks.device())
    for micro in validation_batches(corpus, micro_batch_size=flags.micro_batch_size, rank=0, world_size=1):
        micro = micro.to(ranks.device())
        _, label_N = softmax_kl(model.cls(_hidden(model, micro))[:, : len(corpus.tokenizer)], None, micro.labels)
        sums += torch.stack([label_N.sum(), (micro.labels != IGNORE_INDEX).sum()])
    loss_sum, tokens = sums.tolist()
    return {"eval/loss": loss_sum / tokens}


# --- using ------------------------------------------------------------------------------------------------------------


def masking(cfg: Any, corpus: Corpus) -> dict[str, int]:
    """Checks what of `--teachers` is no model against the run, as `logits.check` and `counts.check`.

    Returns:
        `mask_seed` and `mask_patterns` of `masking.MaskedBatches`, which the caches share; empty without one.
    """
    for name in filter(None, map(counted, cfg.teachers)):
        counts.check(name, corpus)
    source = {"tokenizer": tokenizer_digest(corpus.tokenizer), "data": corpus.fingerprint}
    return logits.check(cfg, BuildFlags, {"kind": "mlm", **source})


def load_teacher(cfg: Any, corpus: Corpus, path: str) -> nn.Module:
    """What answers for `path` of --teachers, on the CPU: records or counts that `masking` has checked, or a BERT.

    Args:
        cfg: `MaskingFlags` with `teacher_dtype`.

    Raises:
        ValueError: as `pretrained.load_pretrained`.
    """
    if folder := cache_folder(path):
        return CachedBert(folder, len(corpus.tokenizer))
    if name := counted(path):
        return counts.teacher(name, corpus)
    return bert.load_teacher(path, len(corpus.tokenizer), seq_len=cfg.seq_len, dtype=cfg.teacher_dtype)


class CachedBert(logits.CachedLogits):
    """A BERT whose answers come from a cache that `masking` has checked."""

    def __init__(self, folder: Path, columns: int) -> None:
        super().__init__(folder, columns)
        if not self.is_top_k:
            try:
                self.head = BertOnlyMLMHead(BertConfig.from_pretrained(folder)).to(self.dtype)
                self.head.load_state_dict(load_file(folder / "head.safetensors"))
            except UNLOADABLE as error:
                raise DamagedError(folder / "head.safetensors", one_line(error), records.REMEDY) from None
