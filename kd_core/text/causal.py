"""Corpora and batches for causal language modelling: the rows of `packing.CausalPacker`, shifted here and nowhere else.

Shapes: N rows, T positions, S supervised positions of N * T.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kd_core.system.checked import read_json
from kd_core.system.files import build_once, cache_key, cache_root, write_json
from kd_core.system.ranks import rank
from kd_core.text.batches import RowBatches, Step, ahead, validation_shares
from kd_core.text.causal_tokenizer import load_causal_tokenizer, train_byte_bpe
from kd_core.text.corpus import IGNORE_INDEX, Corpus, open_c4, open_local, open_source, trained_tokenizer
from kd_core.text.dialogue import KIND, DialoguePacker, contents, dialogue_fields
from kd_core.text.documents import TEXT, Documents
from kd_core.text.flags import CausalTextFlags
from kd_core.text.packing import BEGINS, LABEL, PADDING, CausalPacker

if TYPE_CHECKING:
    from kd_core.training.loop import Run

C4_TOKENIZER = "HuggingFaceTB/SmolLM2-135M"


# -------------------------------------------------------------------------------------------------------------- corpus


def build(cfg: CausalTextFlags) -> Corpus:
    """The corpus of a run, as its flags say; in the cache as `corpus.prepare`'s.

    Its rows are structured arrays [rows, T] with the fields `id` and `marks`; see `packing.CausalPacker`.

    Raises:
        FileNotFoundError, ValueError: one line that names the flag and says what to do.
    """
    progress = rank() == 0
    options: dict[str, Any] = {"packing": cfg.packing, "cut": cfg.on_too_long == "cut"}
    if cfg.data == "c4":
        tokenizer = load_causal_tokenizer(cfg.tokenizer or C4_TOKENIZER, cfg.chat_template)
        return open_c4(tokenizer, CausalPacker.of(tokenizer, cfg.seq_len, **options), progress)
    dialogue = bool(cfg.fields) or _kind(open_source(cfg.data, progress, KIND)) == "dialogue"
    texts = open_source(cfg.data, progress, dialogue_fields(cfg.fields) if dialogue else TEXT)
    if cfg.fields:
        texts = replace(texts, key=cache_key(texts.key, *cfg.fields))
    train = lambda sample, size: train_byte_bpe(map(contents, sample) if dialogue else sample, size)
    tokenizer = load_causal_tokenizer(
        cfg.tokenizer or trained_tokenizer(texts, train, cfg.vocab_size, progress, kind="bytes-tokenizer"),
        cfg.chat_template,
    )
    packer = (DialoguePacker if dialogue else CausalPacker).of(tokenizer, cfg.seq_len, **options)
    corpus = open_local(f"causal-{cache_key(texts.key, packer.identity)}", texts, tokenizer, packer, progress)
    for split, rows in (("training", corpus.rows(0)), ("validation", corpus.validation)):
        if not any((row["marks"] & LABEL).any() for row in rows):
            raise ValueError(
                f"--data {corpus.name} has no response among its {split} rows; give dialogues with turns of the assistant"
            )
    return corpus


def _kind(kinds: Documents) -> str:
    """Of a source's first record; remembered, so that a source in the cache is not asked again."""
    folder = cache_root() / f"kind-{cache_key(kinds.key)}"
    build_once(
        folder, lambda new: write_json(new / "kind.json", {"kind": next((kind for _, kind in kinds.read()), "text")})
    )
    return str(read_json(folder / "kind.json", kind=str)["kind"])


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True, eq=False)
class CausalBatch:
    """What one rank feeds to one forward. A model is called with `use_cache=False`, or documents see each other."""

    input_ids: Tensor  # int64 [N, T]
    position_ids: Tensor  # int64 [N, T], from 0 in each document
    labels: Tensor  # int64 [N, T], the token that each position must predict, or IGNORE_INDEX; not to be shifted again
    positions: Tensor  # int64 [S], indices into N * T of the labels that count, ascending
    attention_mask: Tensor | None  # int64 [N, T], 0 at padding; None where there is none
    sample_ids: Tensor | None = None  # int64 [N], see `order.sample_id`

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What a model takes."""
        return self.input_ids, self.position_ids, self.attention_mask, self.positions

    @property
    def targets(self) -> Tensor:
        """int64 [S], the labels that count."""
        return self.labels.flatten()[self.positions]

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """What says which rows these are."""
        return () if self.sample_ids is None else (self.sample_ids,)

    def _each(self, change: Any) -> "CausalBatch":
        """With `change` made to every tensor that models take; sample ids stay on the host."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "sample_ids"}
        return replace(self, **{name: change(tensor) for name, tensor in named.items() if tensor is not None})

    def pin_memory(self) -> "CausalBatch":
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "CausalBatch":
        """On `device`, copied while it computes if pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))


def batch(ids_NT: np.ndarray, marks_NT: np.ndarray, sample_ids_N: np.ndarray | None = None) -> CausalBatch:
    """Tokens and their marks as a model takes them: labels shifted, positions restarted at every document."""
    N, T = ids_NT.shape
    input_ids_NT = ids_NT.astype(np.int64)
    columns_NT = np.broadcast_to(np.arange(T), (N, T))
    begins_NT = np.maximum.accumulate(np.where(marks_NT & BEGINS, columns_NT, 0), axis=1)
    labels_NT = np.full((N, T), IGNORE_INDEX)
    labels_NT[:, :-1] = np.where(marks_NT[:, 1:] & LABEL, input_ids_NT[:, 1:], IGNORE_INDEX)
    padding_NT = (marks_NT & PADDING).astype(bool)
    return CausalBatch(
        input_ids=torch.from_numpy(input_ids_NT),
        position_ids=torch.from_numpy(columns_NT - begins_NT),
        labels=torch.from_numpy(labels_NT),
        positions=torch.from_numpy(np.flatnonzero(labels_NT != IGNORE_INDEX)),
        attention_mask=torch.from_numpy((~padding_NT).astype(np.int64)) if padding_NT.any() else None,
        sample_ids=None if sample_ids_N is None else torch.from_numpy(sample_ids_N),
    )


class CausalBatches(RowBatches):
    """Optimizer steps of causal rows."""

    def _micro_batches(self, rows_BT: np.ndarray, sample_ids_B: np.ndarray, epochs_B: np.ndarray) -> list[CausalBatch]:
        cuts = [slice(start, start + self._micro) for start in range(0, len(rows_BT), self._micro)]
        return [batch(rows_BT["id"][cut], rows_BT["marks"][cut], sample_ids_B[cut]) for cut in cuts]


def batches(run: "Run[Any]", corpus: Corpus) -> Iterator[Step]:
    """The run's optimizer steps from where it stands, made ahead in a thread; errors as `RowBatches`."""
    return ahead(run, CausalBatches, corpus)


def validation_batches(corpus: Corpus, *, micro_batch_size: int, rank: int, world_size: int) -> Iterator[CausalBatch]:
    """This rank's share of the validation rows, see `validation_shares`; a row that does not count has no label."""
    shares = validation_shares(corpus, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
    for numbers, present in shares:
        rows = corpus.validation[numbers]
        rows["marks"][~present] &= ~np.uint8(LABEL)
        yield batch(rows["id"], rows["marks"], numbers)
