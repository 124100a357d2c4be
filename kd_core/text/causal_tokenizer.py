"""Tokenizers for causal language modelling: read as they are, bytes, or byte-level BPE trained on a corpus.

A tokenizer that leaves this file has an EOS, which ends documents, and has the ids that its file gives: nothing is added to the
vocabulary, so that a checkpoint's rows keep their tokens. Roles that a file does not state (a bare tokenizer.json, a
SentencePiece .model) are those of special tokens with the usual names.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import tokenizers

from kd_core.text.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = "bytes"
USUAL_NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "<|pad|>", "<|padding|>"),
}


def load_causal_tokenizer(name_or_path: str) -> "PreTrainedTokenizerFast":
    """What `read_tokenizer` reads, with its roles; or `bytes`: a token for each byte.

    Raises:
        FileNotFoundError, ValueError: as `read_tokenizer`, or a tokenizer without EOS.
    """
    from transformers import PreTrainedTokenizerFast

    if name_or_path == BYTES:
        return PreTrainedTokenizerFast(
            tokenizer_object=byte_tokenizer(), name_or_path=BYTES, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
    tokenizer = read_tokenizer(name_or_path)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for role, names in USUAL_NAMES.items():
        name = next((name for name in names if name in special), None)
        if getattr(tokenizer, role) is None and name is not None:
            setattr(tokenizer, role, name)
            if role == "bos_token":
                _put_before_texts(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--tokenizer {name_or_path} has no EOS token, which ends a document; give the folder of a causal model's "
            "tokenizer, whose tokenizer_config.json names its eos_token"
        )
    return tokenizer


def _put_before_texts(tokenizer: "PreTrainedTokenizerFast") -> None:
    """BOS, where nothing is put around a text: a SentencePiece model has it and does not say so."""
    backend = tokenizer.backend_tokenizer
    if not backend.encode("").ids:
        bos = str(tokenizer.bos_token)
        backend.post_processor = _begin_with(bos, int(tokenizer.bos_token_id))


def _begin_with(token: str, number: int) -> tokenizers.processors.PostProcessor:
    return tokenizers.processors.TemplateProcessing(f"{token} $A", f"{token} $A {token}:1 $B:1", [(token, number)])


# ------------------------------------------------------------------------------------------------------- bytes and BPE


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies, as in GPT-2: printable ones for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_tokenizer() -> tokenizers.Tokenizer:
    """259 tokens: each byte has its value as id; then <s>, which begins a text, </s> and <pad>."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = _byte_level(tokenizers.models.BPE(vocabulary, []), words=False)
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.post_processor = _begin_with("<s>", 256)
    return tokenizer


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's, of at most `vocab_size` tokens, the first two <|endoftext|> and <|padding|>.

    The result is a pure function of its arguments: all characters are there from the beginning, and ties between merges are
    broken by ids.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and the special tokens.
    """
    special = ["<|endoftext|>", "<|padding|>"]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"--vocab-size must be at least {256 + len(special)}, bytes and special tokens, got {vocab_size}"
        )
    tokenizer = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=byte_characters(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _byte_level(model: tokenizers.models.Model, *, words: bool = True) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
