"""Cached answers for masked language modelling: the teacher's final hidden states at masked positions, or its top k.

A record holds the K supervised positions of one row of the corpus under one pattern of masks. Hidden states are in the
teacher's compute dtype (2 D bytes a position in bf16) and exact for every temperature and divergence: the teacher's
head, which is kept beside them, makes the logits when they are asked for. The top k are smaller for a large width, but
hold at the temperatures of the build only, and share the mass beyond them evenly over the other tokens.

The masks follow from the cache's own seed, and epoch e of a run uses pattern e mod M: so every --seed can share them.

Shapes: B rows, K supervised positions of a row, N = B K, D width, V vocabulary, k entries kept, S temperatures.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM
from transformers.models.bert.modeling_bert import BertOnlyMLMHead
from transformers.utils.logging import disable_progress_bar

from kd_core import cache, cli, engine, teachers, text
from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.tokenizer import tokenizer_digest

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STORED = {"bf16": "<i2", "fp32": "<f4"}  # NumPy has no bfloat16: its bits


@dataclass(frozen=True)
class BuildFlags:
    """Computes a teacher's answers for every row of a corpus once. What was killed is continued by the same command."""

    teacher: str = ""
    """A run folder, a Hugging Face folder or a hub name of a BERT."""
    out: str = ""
    """Folder of the cache."""
    data: str = "embedded"
    """As the recipe's --data; not c4, whose answers fit on no disk."""
    tokenizer: str | None = None
    """As the recipe's."""
    vocab_size: int = 8192
    """As the recipe's."""
    seq_len: int = 128
    """As the recipe's."""
    mask_fraction: float = 0.15
    """As the recipe's."""
    mask_patterns: int = 4
    """Different masks of each row: epoch e of a run uses pattern e mod this."""
    mask_seed: int = 17
    """Of the masks."""
    teacher_dtype: Literal["bf16", "fp32"] = "bf16"
    """Weights and activations of the teacher, and what is stored."""
    top_k: int = 0
    """Store this many of the largest logits instead of hidden states; 0: hidden states."""
    temperatures: tuple[float, ...] = (1.0,)
    """With --top-k: the temperatures at which runs may use the cache."""
    micro_batch_size: int = 32
    """Rows of a forward; as the run's, and answers are the same to the last bit."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "mask_patterns", "micro_batch_size"):
            cli.check_flag(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("mask_seed", "top_k"):
            cli.check_flag(self, name, getattr(self, name) >= 0, "at least 0")
        cli.check_flag(self, "data", self.data != "c4", "data that a disk can hold every answer of")
        cli.check_flag(self, "temperatures", min(self.temperatures, default=0) > 0, "one or more numbers above 0")

    @property
    def settings(self) -> dict[str, Any]:
        """What a run that uses the cache must share, or takes from it."""
        names = "seq_len mask_fraction mask_seed mask_patterns teacher_dtype top_k"
        return {name: getattr(self, name) for name in names.split()}


# --- building ---------------------------------------------------------------------------------------------------------


def build(flags: BuildFlags) -> None:
    """Fills `--out` with the answers of `--teacher`; joins the process group.

    Raises:
        FileNotFoundError, ValueError: as `text.prepare`, `teachers.load_pretrained` and `cache.build`.
    """
    for name in ("teacher", "out"):
        cli.check_flag(flags, name, bool(getattr(flags, name)), "given")
    disable_progress_bar()  # Hugging Face's, for files that load in a moment
    corpus = engine.join(
        lambda: text.prepare(
            flags.data, tokenizer=flags.tokenizer, vocab_size=flags.vocab_size, seq_len=flags.seq_len,
            progress=engine.rank() == 0,
        )
    )  # fmt: skip
    source = teachers.model_source(flags.teacher, "--teacher")
    text.require_same_tokenizer(corpus.tokenizer, source, flag="--teacher")
    columns, dtype = len(corpus.tokenizer), DTYPES[flags.teacher_dtype]
    cli.check_flag(flags, "top_k", flags.top_k < columns, f"below the size of the vocabulary, {columns}")
    model = teachers.load_pretrained(BertForMaskedLM, flags.teacher, columns, flag="--teacher", dtype=dtype)
    model.eval().requires_grad_(False)
    settings = {
        "kind": "mlm",
        "teacher": flags.teacher,
        "weights": teachers.tensor_digest(sorted(model.state_dict().items())),
        "tokenizer": tokenizer_digest(corpus.tokenizer),
        "data": corpus.fingerprint,
        **flags.settings,
        "temperatures": flags.temperatures if flags.top_k else (),
    }
    masked = round(flags.mask_fraction * flags.seq_len)
    fields: list[tuple[str, str, tuple[int, ...]]] = [
        ("hidden", STORED[flags.teacher_dtype], (masked, model.config.hidden_size))
    ]
    if flags.top_k:
        fields = [
            ("ids", "<i4", (masked, flags.top_k)),
            ("logits", "<f4", (masked, flags.top_k)),
            ("log_sum_exp", "<f4", (masked, len(flags.temperatures))),
            ("log_tail", "<f4", (masked, len(flags.temperatures))),
        ]
    layout = cache.Layout(fields, len(corpus.rows(0)), flags.mask_patterns, flags.micro_batch_size)
    model.to(engine.device())

    def companions(folder: Path) -> None:
        model.config.save_pretrained(folder)
        head = {name: tensor.detach().cpu().clone() for name, tensor in model.cls.state_dict().items()}
        save_file(head, folder / "head.safetensors")

    cache.build(
        Path(flags.out), settings, layout, functools.partial(_answer, flags, corpus, model, layout), companions,
        functools.partial(_score, flags, corpus, model),
    )  # fmt: skip


@torch.no_grad()
def _answer(flags: BuildFlags, corpus: text.Corpus, model: Any, layout: cache.Layout, indices: range) -> np.ndarray:
    """Records of the indices, in batches that are always full, because kernels may choose by the shape."""
    size = flags.micro_batch_size
    records = np.empty(len(indices), layout.dtype)
    for start in range(0, len(indices), size):
        wanted = np.asarray(indices[start : start + size])
        patterns_B, rows_B = np.divmod(np.resize(wanted, size), layout.num_samples)
        (micro,) = text.masked_micro_batches(
            corpus.rows(0)[rows_B], text.sample_id(np.zeros_like(rows_B), rows_B), micro_batch_size=size,
            seed=flags.mask_seed, epoch=patterns_B, fraction=flags.mask_fraction, tokenizer=corpus.tokenizer,
        )  # fmt: skip
        hidden_ND = _hidden(model, micro.to(engine.device()))
        stored = {"hidden": hidden_ND.view(torch.int16) if hidden_ND.dtype == torch.bfloat16 else hidden_ND}
        if flags.top_k:
            stored = _top_k(model.cls(hidden_ND)[:, : len(corpus.tokenizer)], flags.top_k, flags.temperatures)
        for name, values in stored.items():
            shaped = values.cpu().numpy().reshape(size, *layout.dtype[name].shape)
            records[name][start : start + len(wanted)] = shaped[: len(wanted)]
    return records


def _hidden(model: Any, micro: text.MicroBatch) -> Tensor:
    return model.bert(micro.input_ids).last_hidden_state.flatten(0, 1)[micro.positions]


def _top_k(logits_NV: Tensor, k: int, temperatures: Sequence[float]) -> dict[str, Tensor]:
    logits_NV = logits_NV.float()
    logits_Nk, ids_Nk = logits_NV.topk(k)
    rest_NV = logits_NV.scatter(1, ids_Nk, -torch.inf)
    log_sum_exp_NS = torch.stack([(logits_NV / tau).logsumexp(-1) for tau in temperatures], -1)
    log_rest_NS = torch.stack([(rest_NV / tau).logsumexp(-1) for tau in temperatures], -1)
    return {
        "ids": ids_Nk.int(),
        "logits": logits_Nk,
        "log_sum_exp": log_sum_exp_NS,
        "log_tail": log_rest_NS - log_sum_exp_NS,
    }


@torch.no_grad()
def _score(flags: BuildFlags, corpus: text.Corpus, model: Any) -> dict[str, float]:
    """The teacher's validation loss, as the recipe measures it."""
    sums = torch.zeros(2, device=engine.device())
    for micro in text.validation_batches(corpus, micro_batch_size=flags.micro_batch_size, rank=0, world_size=1):
        micro = micro.to(engine.device())
        _, label_N = softmax_kl(model.cls(_hidden(model, micro))[:, : len(corpus.tokenizer)], None, micro.labels)
        sums += torch.stack([label_N.sum(), (micro.labels != text.IGNORE_INDEX).sum()])
    loss_sum, tokens = sums.tolist()
    return {"eval/loss": loss_sum / tokens}


# --- using ------------------------------------------------------------------------------------------------------------


def masking(cfg: Any, corpus: text.Corpus) -> dict[str, int]:
    """Checks the caches of `--teachers` against the run.

    Returns:
        `mask_seed` and `mask_patterns` of `text.MaskedBatches`, which the caches share; empty without one.

    Raises:
        FileNotFoundError, ValueError: as `cache.require`; or top-k answers at a temperature that was not built.
    """
    ours = {name: getattr(cfg, name) for name in ("seq_len", "mask_fraction", "teacher_dtype")}
    expected = {"kind": "mlm", "tokenizer": tokenizer_digest(corpus.tokenizer), "data": corpus.fingerprint}
    shared: dict[str, int] = {}
    for folder in filter(None, map(cache.folder_of, cfg.teachers if cfg.distils else ())):
        header = cache.require(folder, ours | expected | shared)
        shared = {name: header[name] for name in ("mask_seed", "mask_patterns")}
        used = {cfg.temperature, cfg.temperature if cfg.temperature_stop is None else cfg.temperature_stop}
        if header["top_k"] and not (len(used) == 1 and used <= set(header["temperatures"])):
            raise ValueError(
                f"--teachers cache:{folder} holds the top {header['top_k']} at the temperatures {header['temperatures']}, "
                f"the run uses {sorted(used)}; choose one of them, or build a cache of hidden states (--top-k 0)"
            )
    return shared


class CachedBert(cache.CachedTeacher):
    """A BERT whose answers come from a cache that `masking` has checked."""

    def __init__(self, folder: Path, columns: int) -> None:
        super().__init__()
        header = cache.read_header(folder)
        self.score = cache.read_manifest(folder)["score"]
        self._records = cache.Records(folder, cache.Layout(**header["layout"]))
        self._dtype, self._temperatures, self._columns = (
            DTYPES[header["teacher_dtype"]],
            header["temperatures"],
            columns,
        )
        if not header["top_k"]:
            self.head = BertOnlyMLMHead(BertConfig.from_pretrained(folder)).to(self._dtype)
            self.head.load_state_dict(load_file(folder / "head.safetensors"))

    def forward(self, sample_ids: Tensor, patterns: Tensor, temperature: float) -> Tensor:
        """Logits [N, V] at the masked positions of rows, int64 [B] each."""
        records_B = self._records.take(sample_ids.numpy(), patterns.numpy())
        stored = {name: _on_device(records_B[name]) for name in records_B.dtype.names or ()}
        if "hidden" in stored:
            hidden_ND = stored["hidden"]
            return self.head(hidden_ND.view(torch.bfloat16) if self._dtype == torch.bfloat16 else hidden_ND)
        return _logits_of_top_k(stored, self._temperatures.index(temperature), temperature, self._columns)


def _logits_of_top_k(stored: dict[str, Tensor], place: int, temperature: float, columns: int) -> Tensor:
    """Logits [N, V] whose probabilities at `temperature` are exact for the top k and share the tail evenly."""
    log_probs_Nk = stored["logits"] / temperature - stored["log_sum_exp"][:, place, None]
    log_each_N1 = stored["log_tail"][:, place, None] - math.log(columns - log_probs_Nk.shape[1])
    return temperature * log_each_N1.repeat(1, columns).scatter(1, stored["ids"].long(), log_probs_Nk)


def _on_device(values: np.ndarray) -> Tensor:
    """[B, K, ...] as [N, ...] on this rank's device, copied while it computes."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).flatten(0, 1)
    return engine.to_device(tensor.pin_memory() if torch.cuda.is_available() else tensor)[0]
