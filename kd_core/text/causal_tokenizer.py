"""Tokenizers for causal language modelling: read as they are, bytes, or byte-level BPE trained on a corpus.

A tokenizer that leaves this file has an EOS, which ends documents, and has the ids that its file gives: nothing is added to the
vocabulary, so that a checkpoint's rows keep their tokens. Roles that a file does not state (a bare tokenizer.json, a
SentencePiece .model) are those of special tokens with the usual names.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from kd_core.system.ranks import rank
from kd_core.system.terminal import one_line, say
from kd_core.text.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = "bytes"
USUAL_NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "<|pad|>", "<|padding|>"),
}


def load_causal_tokenizer(name_or_path: str, chat_template: str | None = None) -> "PreTrainedTokenizerFast":
    """What `read_tokenizer` reads, with its roles; or `bytes`: a token for each byte.

    Args:
        chat_template: a file; None: the tokenizer's own template, where it has one.

    Raises:
        FileNotFoundError, ValueError: as `read_tokenizer`, a tokenizer without EOS, or a template that cannot be read.
    """
    tokenizer = _bytes() if name_or_path == BYTES else _with_roles(read_tokenizer(name_or_path))
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--chat-template {chat_template} cannot be read ({one_line(error)})") from error
    return tokenizer


def _bytes() -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), name_or_path=BYTES, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _with_roles(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    special = special_tokens(tokenizer)
    for role, names in USUAL_NAMES.items():
        name = next((name for name in names if name in special), None)
        if getattr(tokenizer, role) is None and name is not None:
            setattr(tokenizer, role, name)
            if role == "bos_token":
                _put_before_texts(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--tokenizer {tokenizer.name_or_path} has no EOS token, which ends a document; give the folder of a causal model's "
            "tokenizer, whose tokenizer_config.json names its eos_token"
        )
    return tokenizer


def special_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """All that are no text, with a role or without, as <|im_start|>."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _put_before_texts(tokenizer: "PreTrainedTokenizerFast") -> None:
    """BOS, where nothing is put around a text: a SentencePiece model has it and does not say so."""
    backend = tokenizer.backend_tokenizer
    if not backend.encode("").ids:
        bos = str(tokenizer.bos_token)
        backend.post_processor = _begin_with(bos, int(tokenizer.bos_token_id))


def before_a_text(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The special tokens that a tokenizer puts before a text of its own accord."""
    alone, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return next(whole[:at] for at in range(len(whole)) if whole[at : at + len(alone)] == alone)


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


# ---------------------------------------------------------------------------------------------------------- vocabularies


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the largest id: what a model needs to know, also where a vocabulary has holes."""
    return max(tokenizer.get_vocab().values()) + 1


def align(ours: "PreTrainedTokenizerFast", found: Sequence[tuple[str, str]]) -> int:
    """How many columns of logits mean the same token in the run and in all models; warns of other EOS and PAD.

    Sizes say nothing: heads are padded, each in its own way. What counts is that a model gives each of the run's tokens the
    same id. What it has behind them, such as tokens added for chats, is never in the data and left out of its logits.

    Args:
        ours: the run's tokenizer, which makes the data.
        found: flag and source of each model.

    Raises:
        ValueError: a model whose tokenizer differs, the first differing token named, or has none.
    """
    for flag, source in found:
        try:
            theirs = load_causal_tokenizer(source)
        except (ValueError, OSError) as error:
            raise ValueError(f"{flag} {source} comes without a tokenizer to compare with the run's: {error}") from error
        here, there = ({number: token for token, number in one.get_vocab().items()} for one in (ours, theirs))
        for number in range(vocabulary_size(ours)):
            if here.get(number) != there.get(number):
                one, other = (repr(side[number]) if number in side else "no token" for side in (there, here))
                raise ValueError(
                    f"{flag} {source} has another vocabulary than the run ({ours.name_or_path}): {number} is {one} there and "
                    f"{other} here; give --tokenizer {source}, or another model"
                )
        if rank() == 0:
            for role in ("eos_token", "pad_token"):
                _warn_of(role, ours, theirs, f"{flag} {source}")
    return vocabulary_size(ours)


def _warn_of(role: str, ours: "PreTrainedTokenizerFast", theirs: "PreTrainedTokenizerFast", model: str) -> None:
    here, there = ((getattr(one, role), getattr(one, f"{role}_id")) for one in (ours, theirs))
    if None in (*here, *there) or here == there:
        return
    names = (
        f"{there[0]!r} ({there[1]}) of {model} and {here[0]!r} ({here[1]}) of the run's tokenizer {ours.name_or_path}"
    )
    if role == "eos_token":
        say(
            f"warning: EOS differs: {names}; so do base and chat models of one family: what one ends with the other does not "
            "expect, and a student of both may not end at all"
        )
    else:
        say(f"warning: PAD differs: {names}; it is no label, but who generates with either must say which")


def token_bytes(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """UTF-8 bytes of text that each token stands for, int64 [vocabulary_size]; 0 for special tokens, which are no text.

    Losses per token cannot be compared across tokenizers; their sum over the sum of these bytes can. The tokens of a text add
    up to its bytes where a tokenizer keeps them all: byte-level, or SentencePiece with byte fallback, which puts a space
    before a text.
    """
    byte_level = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
    added = tokenizer.added_tokens_decoder
    counts = np.zeros(vocabulary_size(tokenizer), np.int64)
    for token, number in tokenizer.get_vocab().items():
        if number in added:  # is in the vocabulary as it is in a text
            counts[number] = 0 if added[number].special else len(token.encode())
        elif byte_level:
            counts[number] = len(token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            counts[number] = 1
        else:
            counts[number] = len(token.replace("\u2581", " ").encode())
    return counts
