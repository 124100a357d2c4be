"""The flags of a run or a cache that reads text."""

import dataclasses
from typing import ClassVar, Literal

from kd_core.cli import Flags

MIN_SEQ_LEN, MAX_SEQ_LEN = 8, 65_536


@dataclasses.dataclass(frozen=True)
class TextFlags(Flags):
    """Source, tokenizer and length of samples."""

    GROUP: ClassVar[str] = "data"
    data: str = "embedded"
    """c4, a hub name, a file or folder of txt/jsonl/json/parquet (.gz, .xz, .bz2, .zst), or embedded (Python's documentation)."""
    tokenizer: str | None = None
    """Hub name, folder, tokenizer.json or SentencePiece .model; default: WordPiece trained on the data (c4: BERT's)."""
    vocab_size: int = 8192
    """Size of the WordPiece vocabulary when it is trained on the data."""
    seq_len: int = 128
    """Tokens per sample."""

    LONGEST: ClassVar[int] = MAX_SEQ_LEN

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = MIN_SEQ_LEN <= self.seq_len <= self.LONGEST
        self.check("seq_len", fits, f"between {MIN_SEQ_LEN} and {self.LONGEST}")
        self.check("vocab_size", self.vocab_size >= 1, "at least 1")


@dataclasses.dataclass(frozen=True)
class MaskingFlags(TextFlags):
    """Samples for masked language modelling."""

    GROUP: ClassVar[str] = "data"
    mask_fraction: float = 0.15
    """Share of the positions masked in training (MosaicBERT: 0.30); evaluation always masks 0.15."""

    LONGEST: ClassVar[int] = 512  # BERT's

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mask_fraction(self.mask_fraction, self.seq_len)


@dataclasses.dataclass(frozen=True)
class CausalTextFlags(TextFlags):
    """Samples for causal language modelling: text, or prompts and responses."""

    GROUP: ClassVar[str] = "data"
    tokenizer: str | None = None
    """Hub name, folder, tokenizer.json, SentencePiece .model, or bytes; default: byte-level BPE trained on the data."""
    vocab_size: int = 8192
    """Size of the byte-level BPE vocabulary when it is trained on the data."""
    fields: tuple[str, str] | None = None
    """Names of a record's prompt and response, as `question answer`; default: text, or the names that are known."""
    packing: bool = True
    """Fill a row with documents, none of which sees another; without, one a row, padded."""
    attention: Literal["sdpa", "varlen"] = "sdpa"
    """sdpa: with a mask where a row has several documents; varlen: each by itself, on a GPU by flash attention, in bf16."""
    on_too_long: Literal["drop", "cut"] = "drop"
    """What becomes of a document that has to stand in one row and is longer than --seq-len: nothing, or its beginning."""
    chat_template: str | None = None
    """File with the Jinja template that messages are rendered by; default: the tokenizer's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("fields", not self.fields or self.data != "c4", "left out for c4, whose records are texts")


def check_mask_fraction(mask_fraction: float, seq_len: int) -> None:
    if not (0 < mask_fraction < 1 and 1 <= round(mask_fraction * seq_len) <= seq_len - 2):
        raise ValueError(
            f"--mask-fraction must be in (0, 1) and select at least one of the {seq_len} positions, got {mask_fraction}"
        )
