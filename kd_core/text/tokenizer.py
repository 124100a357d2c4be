"""Tokenizers: read from files or the hub as they are; for masked-language modelling, completed or trained on a corpus.

Every tokenizer that `load_tokenizer` gives is a `PreTrainedTokenizerFast` with [CLS], [SEP], [PAD] and [MASK] (under whatever
names it has for them; missing ones are added at the end of the vocabulary), puts them around a text or a pair of texts,
and neither cuts nor pads of its own accord. Those for causal language modelling: `causal_tokenizer`.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from huggingface_hub.errors import StrictDataclassError

from kd_core.system.hub import require_hub
from kd_core.system.terminal import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# For each role, the names it has in common tokenizers; the first is used when a vocabulary has none of them.
ROLES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
# Rarer characters become [UNK] with their word, so that the vocabulary goes to words: at most this many are kept, ...
MAX_ALPHABET = 1000
# ... and of a large text only those that are more frequent than this.
MIN_CHARACTER_SHARE = 1e-6
MOST_UNKNOWN = 0.5  # of a text's tokens
SPACE = "\u2581"  # what SentencePiece writes for a space
SAMPLED_LINES = 200
ORDINARY_LINES = [
    "The quick brown fox, 3,141 times: it's (almost) 50% over the lazy dog's e-mail!", " A space before, and one behind ",
    "na\u00efve caf\u00e9, \u00bfqu\u00e9?", "\u4e2d\u6587\u5b57 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f600", "two\nlines\tand a tab", "x",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(name_or_path: str) -> "PreTrainedTokenizerFast":
    """A tokenizer for masked-language modelling; arguments and errors as `read_tokenizer`."""
    return _with_special_tokens(read_tokenizer(name_or_path))


def read_tokenizer(name_or_path: str) -> "PreTrainedTokenizerFast":
    """A tokenizer from a hub name, a Hugging Face folder, a `tokenizer.json`, a `vocab.txt` or a SentencePiece `.model`.

    Nothing is added to it; but it neither cuts nor pads. A path is read without touching the network; code that comes with a
    tokenizer is never run.

    Raises:
        FileNotFoundError: a path at which nothing is.
        ValueError: no tokenizer is there, it is damaged or of an unsupported kind, or the hub cannot be reached.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(name_or_path).expanduser()
    if path.is_dir():
        tokenizer: Any = _from_folder(path)
    elif path.is_file():
        tokenizer = _from_file(path)
    elif _looks_like_path(name_or_path):
        raise FileNotFoundError(
            f"--tokenizer {name_or_path}: no such file or folder; give a Hugging Face folder, a tokenizer.json, a "
            "SentencePiece .model, or a name on the hub"
        )
    else:
        tokenizer = _from_hub(name_or_path)
    tokenizer.name_or_path = name_or_path
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"--tokenizer {name_or_path} has no fast (Rust) form; give a tokenizer.json")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def same_tokenizer(a: "PreTrainedTokenizerFast", b: "PreTrainedTokenizerFast") -> bool:
    """Whether two tokenizers give every token, and every special role, the same id.

    Then logits of models that were trained with them can be compared column by column.
    """
    return a is b or (a.get_vocab() == b.get_vocab() and _special_ids(a) == _special_ids(b))


def require_same_tokenizer(ours: "PreTrainedTokenizerFast", source: str, *, flag: str) -> None:
    """Refuses a model, named by `flag`, whose tokenizer is not `ours`.

    Raises:
        ValueError: another tokenizer, with both names, or none that can be loaded.
    """
    try:
        theirs = load_tokenizer(source)
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag} {source} comes without a tokenizer to compare with the run's: {error}") from error
    if not same_tokenizer(theirs, ours):
        raise ValueError(
            f"{flag} {source} has another tokenizer ({len(theirs)} tokens) than the run ({ours.name_or_path}, {len(ours)} "
            f"tokens); give --tokenizer {source}, or another model"
        )


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Identifies what a tokenizer does to a text: normalisation, model, vocabulary, special ids."""
    content = tokenizer.backend_tokenizer.to_str() + json.dumps(_special_ids(tokenizer))
    return hashlib.sha256(content.encode()).hexdigest()


def unknown_share(tokenizer: "PreTrainedTokenizerFast", ids: np.ndarray, what: str) -> float:
    """The share of unknown tokens in `ids`, of `what`, tokens around texts aside.

    Raises:
        ValueError: it is above half, or there is nothing: a model would learn nothing of the text.
    """
    roles = (getattr(tokenizer, f"{role}_token_id") for role in ("cls", "sep", "pad", "bos", "eos"))
    content = ids[~np.isin(ids, [role for role in roles if role is not None])]
    share = float((content == tokenizer.unk_token_id).mean()) if len(content) else 1.0
    if share > MOST_UNKNOWN:
        raise ValueError(
            f"{what}: {share:.0%} of the tokens are unknown to the tokenizer {tokenizer.name_or_path}; give text in a script that "
            "it has, or another tokenizer"
        )
    return share


def _special_ids(tokenizer: "PreTrainedTokenizerFast") -> dict[str, int | None]:
    return {role: getattr(tokenizer, f"{role}_id") for role in ROLES}


def _looks_like_path(name: str) -> bool:
    parent = Path(name).expanduser().parent
    return (
        name.startswith((".", "/", "~"))
        or name.endswith((".json", ".model", ".txt"))
        or name.count("/") > 1
        or (parent != Path(".") and parent.is_dir())
    )


def _from_file(path: Path) -> "PreTrainedTokenizerFast":
    if path.suffix == ".json":
        return _from_json(path)
    if path.suffix == ".model":
        return _from_sentencepiece(path)
    if path.name == "vocab.txt":
        return _from_folder(path.parent)
    raise ValueError(
        f"--tokenizer {path}: unsupported kind of file; give a Hugging Face folder, a tokenizer.json, a vocab.txt or a "
        "SentencePiece .model"
    )


def _from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer, BertTokenizer

    has_config = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    models = sorted(folder.glob("*.model"))
    vocabularies = [
        folder / name for name in ("tokenizer.json", "vocab.txt", "vocab.json") if (folder / name).is_file()
    ]
    if not models and not vocabularies:
        raise ValueError(
            f"--tokenizer {folder} holds no tokenizer (tokenizer.json, vocab.txt or *.model); give another folder, or the "
            "name of a tokenizer on the hub"
        )
    with clear_errors(f"--tokenizer {folder} cannot be loaded"):
        if has_config:
            loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        elif (folder / "vocab.txt").is_file() and not (folder / "tokenizer.json").is_file():
            # Not BertTokenizer(vocab_file=...), which transformers 5 builds with an empty vocabulary.
            return BertTokenizer.from_pretrained(str(folder), local_files_only=True)
    if has_config:
        if len(models) == 1 and not vocabularies:  # else another file says what the tokens are
            remedy = f"give --tokenizer {models[0]}, which has its own tokens, or a folder with tokenizer.json"
            _require_same_tokens(loaded.backend_tokenizer, _sentencepiece_proto(models[0]), folder, remedy)
        return loaded
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder / "tokenizer.json")
    if len(models) == 1:
        return _from_sentencepiece(models[0])
    raise ValueError(f"--tokenizer {folder} holds {[model.name for model in models]}; name the file")


def _from_json(path: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    with clear_errors(f"--tokenizer {path} is not a tokenizer.json"):
        return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))


@contextmanager
def clear_errors(complaint: str, remedy: str = "give another tokenizer") -> Iterator[None]:
    """Turns what the libraries raise for a tokenizer that they cannot read into one line."""
    try:
        yield
    except BaseException as error:
        # The Rust library raises a bare Exception, and nothing narrower, for a file that it cannot parse;
        # transformers whatever it meets in a config.json of another shape.
        known = OSError | ValueError | KeyError | TypeError | AttributeError | RecursionError | StrictDataclassError
        if not isinstance(error, known) and type(error) is not Exception:
            raise
        raise ValueError(f"{complaint} ({one_line(error)}); {remedy}") from error


def _sentencepiece_proto(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"--tokenizer {path} is not a SentencePiece model ({one_line(error)})") from error
    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    if kind not in ("UNIGRAM", "BPE") or not proto.pieces:
        raise ValueError(f"--tokenizer {path} is a SentencePiece model of type {kind}; allowed are UNIGRAM and BPE")
    return proto


def _from_sentencepiece(path: Path) -> "PreTrainedTokenizerFast":
    """The model in Rust, with the ids of the `.model` file."""
    from transformers import PreTrainedTokenizerFast

    proto = _sentencepiece_proto(path)
    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    control = [piece.piece for piece in proto.pieces if piece.type == piece.CONTROL]
    user_defined = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    tokenizer = tokenizers.Tokenizer(_unigram_model(proto) if kind == "UNIGRAM" else _bpe_model(proto))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(_sentencepiece_normalizers(proto, user_defined))
    suffix = proto.trainer_spec.treat_whitespace_as_suffix
    if not any(SPACE in (piece.piece[:-1] if suffix else piece.piece[1:]) for piece in proto.pieces):
        # No piece goes on beyond a space, so words can be taken apart, which is faster.
        behavior: Any = "merged_with_previous" if suffix else "merged_with_next"
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(SPACE, behavior)
    scheme: Any = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    space = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    # Spaces first: of one fused token, Metaspace would take all for the one before a text.
    bytes_and_space = [space, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    tokenizer.decoder = tokenizers.decoders.Sequence(bytes_and_space) if proto.trainer_spec.byte_fallback else space
    tokenizer.add_tokens([tokenizers.AddedToken(piece, normalized=True) for piece in user_defined])
    tokenizer.add_special_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in control])
    _require_same_tokens(tokenizer, proto, path, "train it without that option, or give another tokenizer")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=proto.trainer_spec.unk_piece)


def _unigram_model(proto: Any) -> tokenizers.models.Model:
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    return tokenizers.models.Unigram(scores, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback)


def _bpe_model(proto: Any) -> tokenizers.models.Model:
    """SentencePiece merges any two pieces that form a piece, the best piece first."""
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    best_first = sorted(proto.pieces, key=lambda piece: -piece.score)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (piece.piece for piece in best_first)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    spec = proto.trainer_spec
    return tokenizers.models.BPE(ids, merges, unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _sentencepiece_normalizers(proto: Any, user_defined: list[str]) -> list[tokenizers.normalizers.Normalizer]:
    """Spaces as SentencePiece has them. User-defined pieces go through this too, and alone they get no prefix."""
    spec, regex, replace = proto.normalizer_spec, tokenizers.Regex, tokenizers.normalizers.Replace
    steps: list[tokenizers.normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(tokenizers.normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [replace(regex(r"\A +| +\z"), ""), replace(regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        alone = "|".join(map(re.escape, user_defined))
        end = r"\z" if proto.trainer_spec.treat_whitespace_as_suffix else r"\A"
        steps.append(replace(regex(f"(?!\\A(?:{alone})\\z){end}" if alone else end), SPACE))
    return [*steps, replace(" ", SPACE)]


def _require_same_tokens(tokenizer: tokenizers.Tokenizer, proto: Any, path: Path, remedy: str) -> None:
    """Compares tokens with SentencePiece's own, on lines made of the model's pieces and on ordinary ones.

    Raises:
        ValueError: they differ, by an option that the form in Rust does not follow.
    """
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_proto=proto.SerializeToString())
    taken = [piece.piece for piece in proto.pieces if piece.type in (piece.NORMAL, piece.USER_DEFINED)]
    draw = random.Random(0)
    lines = ["".join(draw.choices(taken, k=12)).replace(SPACE, " ") for _ in range(SAMPLED_LINES)] + ORDINARY_LINES
    lines = [line.replace(" ", " " * spaces) for spaces in (1, 3, 9) for line in lines]
    ours = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    ours.encode_special_tokens = True
    # By name, as some families number their pieces anew; not `.tokens`, which of unknown ones says the text.
    fast = [list(map(ours.id_to_token, one.ids)) for one in ours.encode_batch(lines, add_special_tokens=False)]
    slow = [list(map(theirs.id_to_piece, ids)) for ids in theirs.encode(lines)]
    if wrong := [line for line, a, b in zip(lines, fast, slow, strict=True) if a != b]:
        raise ValueError(
            f"--tokenizer {path} has an option of SentencePiece that its fast form does not follow: {len(wrong)} of {len(lines)} "
            f"lines have other tokens, the first {wrong[0]!r}; {remedy}"
        )


def _from_hub(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        require_hub(f"--tokenizer {name} is no local path, and the tokenizer of that name")
    with clear_errors(f"--tokenizer {name} cannot be loaded from the hub"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _with_special_tokens(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    vocabulary = tokenizer.get_vocab()
    taken = set(vocabulary.values())
    if hole := next((str(number) for number in range(len(vocabulary)) if number not in taken), ""):
        raise ValueError(
            f"--tokenizer {tokenizer.name_or_path} has {len(vocabulary)} tokens with ids up to {max(taken)}, and none has id {hole}; "
            f"if line {int(hole) + 1} of its vocab.txt stands there twice, give that one a name of its own, such as [unused]"
        )
    missing: dict[str, Any] = {}
    for role, names in ROLES.items():
        if getattr(tokenizer, role) is None and (role != "unk_token" or names[0] in vocabulary):
            missing[role] = next((name for name in names if name in vocabulary), names[0])
    tokenizer.add_special_tokens(missing)
    backend = tokenizer.backend_tokenizer
    cls, sep = (tokenizer.cls_token, tokenizer.cls_token_id), (tokenizer.sep_token, tokenizer.sep_token_id)
    one, two = backend.encode("").ids, backend.encode("", "").ids
    if any(ids[:1] + ids[-1:] != [cls[1], sep[1]] for ids in (one, two)) or sep[1] not in two[1:-1]:
        backend.post_processor = tokenizers.processors.BertProcessing(sep, cls)  # SentencePiece models have none
    return tokenizer


# ------------------------------------------------------------------------------------------------------------ training


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A lower-casing WordPiece tokenizer as BERT's, of at most `vocab_size` tokens.

    The result is a pure function of its arguments. The trainer alone is not: it numbers characters in the order of a hash
    map, and breaks ties between merges by these numbers. Characters that are given as special tokens are numbered in the
    order given; rebuilding the model from the vocabulary makes them ordinary tokens again.

    Raises:
        ValueError: `vocab_size` is too small for the special tokens and the characters of the text.
    """
    texts = list(texts)
    alphabet = _alphabet(texts)
    needed = len(SPECIAL_TOKENS) + 2 * len(alphabet)
    if vocab_size < needed:
        raise ValueError(
            f"--vocab-size {vocab_size} is too small: the text has {len(alphabet)} characters, which alone need {needed} "
            f"tokens; give at least {2 * needed}"
        )
    fixed = SPECIAL_TOKENS + alphabet + ["##" + character for character in alphabet]
    trainee = _bert_pipeline(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=fixed,
        show_progress=False,
    )
    trainee.train_from_iterator(texts, trainer)
    trained = _bert_pipeline(tokenizers.models.WordPiece(trainee.get_vocab(), unk_token="[UNK]"))
    trained.add_special_tokens(SPECIAL_TOKENS)
    ids = [(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")]
    trained.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids
    )
    return trained


def _bert_pipeline(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


def _alphabet(texts: list[str]) -> list[str]:
    """The normalised characters of the texts that are worth a token, in the order of their code points."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for start in range(0, len(texts), 1000):
        code_points = np.frombuffer("".join(texts[start : start + 1000]).encode("utf-32-le"), dtype="<u4")
        counts += np.bincount(code_points, minlength=len(counts))
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    normalised: dict[str, int] = {}
    for code_point in np.flatnonzero(counts):
        for character in "".join(normalizer.normalize_str(chr(code_point)).split()):
            normalised[character] = normalised.get(character, 0) + int(counts[code_point])
    common = [c for c, count in normalised.items() if count >= MIN_CHARACTER_SHARE * counts.sum()]
    return sorted(sorted(common, key=lambda c: (-normalised[c], c))[:MAX_ALPHABET])
