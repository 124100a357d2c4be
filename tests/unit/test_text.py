"""Text: sources, splits, tokenizers, packing, masking, batches, the cache, and C4 from a made-up hub cache."""

import collections
import gzip
import itertools
import json
import lzma
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from huggingface_hub import constants as hub_constants

from kd_core.system import hashing
from kd_core.system.ahead import prefetch
from kd_core.system.files import Unwritable
from kd_core.system.splits import named_split
from kd_core.text import c4, documents, packing
from kd_core.text import corpus as corpora
from kd_core.text import masking as text
from kd_core.text.corpus import IGNORE_INDEX, open_source, prepare
from kd_core.text.order import Position, shard_order
from kd_core.text.tokenizer import SPECIAL_TOKENS, load_tokenizer, same_tokenizer, tokenizer_digest
from tests.recipes.test_bad_input import Harmful

PROJECT = Path(__file__).parents[2]
DATA = Path(os.environ.get("KD_DATA") or PROJECT.parent / "shared" / "data")
VOCAB_SIZE = 300
SEQ_LEN = 32


def needs_data(name):
    return pytest.mark.skipif(not (DATA / name).exists(), reason=f"no {name} in {DATA}; KD_DATA names the folder")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_texts(count, seed=0, words=40):
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(200)]
    return [" ".join(rng.choices(vocabulary, k=words)) + f" number {seed}-{i}." for i in range(count)]


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    return path


def make_corpus(tmp_path, count=600, **settings):
    source = tmp_path / "corpus.jsonl"
    if not source.exists():
        write_jsonl(source, make_texts(count))
    return prepare(str(source), **{"tokenizer": None, "vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN} | settings)


def make_batches(corpus, **settings):
    defaults = {
        "seed": 1,
        "global_batch_size": 12,
        "micro_batch_size": 3,
        "rank": 0,
        "world_size": 1,
        "mask_fraction": 0.15,
    }
    return text.MaskedBatches(corpus, **defaults | settings)


def read(path):
    return list(documents.local_documents(path))


def of_split(pairs, split):
    return [t for s, t in pairs if s == split]


def run_python(code, *args, **env):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(PROJECT)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def error_line(error):
    line = str(error.value)
    assert "\n" not in line and line, line
    return line


# ------------------------------------------------------------------------------------------------------------- formats


def write_parquet(path, texts):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path)


WRITERS = {
    "txt": lambda path, texts: path.write_text("\n\n".join(texts) + "\n"),
    "jsonl": write_jsonl,
    "json": lambda path, texts: path.write_text(json.dumps([{"text": t} for t in texts], indent=1)),
    "parquet": write_parquet,
}


@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_and_compression_gives_the_same_documents(tmp_path, kind, compression):
    texts = [*make_texts(20), "two\nlines, caf\u00e9"]
    path = tmp_path / f"x.{kind}"
    WRITERS[kind](path, texts)
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[compression]
    packed = tmp_path / "packed" / f"x.{kind}{compression}"
    packed.parent.mkdir()
    packed.write_bytes(compress(path.read_bytes()))
    assert [t.strip() for t in documents.read_file(packed)] == texts


def test_json_may_hold_lines_and_empty_documents_do_not_count(tmp_path):
    path = write_jsonl(tmp_path / "x.json", ["one", " \n", "two"])
    assert list(documents.read_file(path)) == ["one", "two"]


def test_blank_lines_separate_documents_whatever_the_line_ends(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\nstill one\r\n\r\n \r\ntwo\n\n\n\nthree")
    assert [t.split() for t in documents.read_file(path)] == [["one", "still", "one"], ["two"], ["three"]]


def test_a_folder_is_read_recursively_in_order_without_other_files(tmp_path):
    for name in ("b/two.txt", "a.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "README.md").write_text("not data")
    assert [t for _, t in read(tmp_path)] == ["a.txt", "b/two.txt", "c.txt"]


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.txt", "train"),
        ("Train-00001-of-3.parquet", "train"),
        ("training_set.jsonl", "train"),
        ("val.txt", "validation"),
        ("valid2.txt", "validation"),
        ("validation_matched.json", "validation"),
        ("dev.txt", "validation"),
        ("test.txt.gz", "test"),
        ("testset.txt", "test"),
        ("values.txt", None),
        ("devices.txt", None),
        ("testament.txt", None),
        ("trains.txt", None),
    ],
)
def test_split_names(name, split):
    assert named_split(name) == split


def test_named_splits(tmp_path):
    texts = make_texts(30)
    write_jsonl(tmp_path / "train.jsonl", [*texts[:10], texts[20] + "\n"])
    write_jsonl(tmp_path / "more.jsonl", texts[10:20])
    write_jsonl(tmp_path / "dev.jsonl", texts[20:25])
    write_jsonl(tmp_path / "test.jsonl", texts[25:])
    source = documents.local_documents(tmp_path)
    pairs = list(source)
    assert sorted(of_split(pairs, "train")) == sorted(texts[:20]), (
        "unnamed files are training text, equal texts are not"
    )
    assert of_split(pairs, "validation") == texts[20:25]
    assert source.duplicates == 1


def test_split_folders(tmp_path):
    write_jsonl(tmp_path / "train" / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "validation" / "a.jsonl", ["y"])
    assert read(tmp_path) == [("validation", "y"), ("train", "x")]


def test_hashed_splits(tmp_path):
    texts = make_texts(2000, words=3)
    pairs = read(write_jsonl(tmp_path / "val.jsonl", texts + texts[::-1]))
    validation, train = of_split(pairs, "validation"), of_split(pairs, "train")
    assert not set(validation) & set(train)
    assert 2 * 20 <= len(validation) <= 2 * 65, "about 2 %, and both copies of each"
    assert len(validation) + len(train) == 4000


def test_a_train_file_without_validation_file_is_split_by_hash(tmp_path):
    pairs = read(write_jsonl(tmp_path / "train.jsonl", make_texts(500, words=3)).parent)
    assert of_split(pairs, "validation") and of_split(pairs, "train")


def test_validation_splits_alone_are_refused(tmp_path):
    write_jsonl(tmp_path / "val.jsonl", ["x"])
    with pytest.raises(ValueError) as error:
        read(tmp_path)
    assert "only validation splits" in error_line(error)


def test_test_splits_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", ["x"])
    for source in (path, tmp_path):
        with pytest.raises(ValueError) as error:
            read(source)
        assert "never trained on" in error_line(error)


# ------------------------------------------------------------------------------------------------------------- packing


def test_rows_are_the_stream_of_documents_without_padding(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 7)  # many batches, so that rows run over their ends
    corpus = make_corpus(tmp_path)
    tokenizer = corpus.tokenizer
    body, sep = SEQ_LEN - 2, tokenizer.sep_token_id
    stream = []
    for t in of_split(read(tmp_path / "corpus.jsonl"), "train"):
        stream += [*tokenizer(t, add_special_tokens=False)["input_ids"], sep]
    rows = corpus.rows(0)
    assert rows.dtype == np.uint16 and rows.shape == (len(stream) // body, SEQ_LEN)
    assert (rows[:, 0] == tokenizer.cls_token_id).all() and (rows[:, -1] == sep).all()
    assert rows[:, 1:-1].reshape(-1).tolist() == stream[: rows.shape[0] * body]
    assert 1 <= len(corpus.validation) <= packing.VALIDATION_ROWS


def test_special_tokens_in_a_text_are_text(tmp_path):
    packer = packing.MaskedPacker.of(make_corpus(tmp_path).tokenizer, 8)
    packer.write(tmp_path / "rows", ["[MASK] abc [SEP] " * 20])
    body = packer.open(tmp_path / "rows")[:, 1:-1]
    assert packer.tokenizer.token_to_id("[MASK]") not in body and packer.sep_id not in body


def test_long_documents_are_cut_at_spaces_only(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path)
    long = " ".join(make_texts(50))
    write = lambda name: packing.MaskedPacker.of(corpus.tokenizer, 8).write(tmp_path / name, [long])
    write("whole")
    monkeypatch.setattr(packing, "MAX_PIECE_CHARS", 100)
    assert "".join(packing._pieces(long)) == long and len(packing._pieces(long)) > 100
    write("pieces")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


def test_many_tokens_need_uint32(tmp_path):
    corpus = make_corpus(tmp_path)
    packer = packing.MaskedPacker.of(corpus.tokenizer, SEQ_LEN)
    assert [text.replace(packer, vocab_size=size).dtype for size in (65_535, 65_536)] == [np.uint16, np.uint32]


def test_validation_rows_are_bounded_and_taken_by_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "VALIDATION_ROWS", 5)
    write_jsonl(tmp_path / "data" / "train.jsonl", make_texts(100))
    validation = make_texts(300, seed=9)
    write_jsonl(tmp_path / "data" / "val.jsonl", validation)
    corpus = prepare(str(tmp_path / "data"), tokenizer=None, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN)
    assert corpus.validation.shape == (5, SEQ_LEN)
    first = min(validation, key=documents.text_digest)
    expected = corpus.tokenizer(first, add_special_tokens=False)["input_ids"][: SEQ_LEN - 2]
    assert corpus.validation[0, 1:-1].tolist() == expected


def test_held_out_text_stays_bounded():
    held_out = packing.HeldOut(seq_len=8)
    size = held_out._limit // 10
    assert list(held_out.divert(("validation", f"{i:06d}" + "x" * size) for i in range(100))) == []
    assert held_out.count == 100 and len(held_out.texts()) == 10
    assert held_out.texts() == sorted(held_out.texts(), key=documents.text_digest)


# --------------------------------------------------------------------------------------------------------------- cache

PREPARE = """
import sys, time
from kd_core.text import corpus as corpora
build, starts = corpora._build_corpus, []
def counted(*args):
    starts.append(1)
    time.sleep(1)
    build(*args)
corpora._build_corpus = counted
corpus = corpora.prepare(sys.argv[1], tokenizer=None, vocab_size=300, seq_len=32)
print(len(starts), corpus.fingerprint, corpus.rows(0).tobytes().hex()[:4000])
"""


def test_two_processes_at_once_build_once(tmp_path, cache):
    source = write_jsonl(tmp_path / "corpus.jsonl", make_texts(600))
    first, second = [finish(p).split() for p in [run_python(PREPARE, source), run_python(PREPARE, source)]]
    assert sorted([first[0], second[0]]) == ["0", "1"]
    assert first[1:] == second[1:]
    assert make_corpus(tmp_path).fingerprint == first[1]
    assert not list(cache.glob("*.new"))


def test_an_interrupted_build_is_repaired(tmp_path, cache, monkeypatch):
    write = packing.Packer.write

    def killed(packer, path, *args, **kwargs):
        write(packer, path, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packing.Packer, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            make_corpus(tmp_path)
    assert not list(cache.glob("corpus-*[!k]")), "what is incomplete is not visible"
    corpus = make_corpus(tmp_path)
    (folder,) = [path for path in cache.glob("corpus-*") if path.is_dir()]
    rows = corpus.rows(0).copy()
    # kill -9 leaves the unfinished folder behind.
    folder.rename(folder.with_name(folder.name + ".new"))
    (folder.with_name(folder.name + ".new") / "train.bin").write_bytes(b"half")
    assert (make_corpus(tmp_path).rows(0) == rows).all()
    assert not list(cache.glob("*.new"))


def test_the_cache_is_keyed_by_content_tokenizer_and_settings(tmp_path, monkeypatch):
    first = make_corpus(tmp_path)
    assert make_corpus(tmp_path, seq_len=16).fingerprint != first.fingerprint
    assert make_corpus(tmp_path, vocab_size=200).fingerprint != first.fingerprint
    os.utime(tmp_path / "corpus.jsonl", (1, 1))
    assert make_corpus(tmp_path).fingerprint == first.fingerprint, "same content at another time"
    write_jsonl(tmp_path / "corpus.jsonl", make_texts(500))
    assert make_corpus(tmp_path).fingerprint != first.fingerprint


def test_opening_again_reads_no_text(tmp_path, monkeypatch):
    first = make_corpus(tmp_path)
    monkeypatch.setattr(documents, "read_file", lambda path: pytest.fail("read again"))
    again = make_corpus(tmp_path)
    assert again.fingerprint == first.fingerprint and (again.validation == first.validation).all()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Unwritable) as error:
        make_corpus(tmp_path)
    assert "KD_CACHE" in error_line(error)


def test_reports(tmp_path, capsys):
    make_corpus(tmp_path)
    assert capsys.readouterr() == ("", "")
    make_corpus(tmp_path, seq_len=16, progress=True)
    assert "tokenising corpus.jsonl: " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- tokenizers

TRAIN = """
import hashlib, json, sys
from kd_core.text.tokenizer import train_wordpiece
print(hashlib.sha256(train_wordpiece(json.load(open(sys.argv[1])), 600).to_str().encode()).hexdigest())
"""


def test_training_gives_the_same_tokenizer_in_every_process(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(make_texts(1500) + list(documents.local_documents.__doc__)))
    settings = [("0", "1"), ("7", "2"), ("99", "4")]
    runs = [run_python(TRAIN, tmp_path / "texts.json", PYTHONHASHSEED=h, RAYON_NUM_THREADS=t) for h, t in settings]
    assert len({finish(run) for run in runs}) == 1


def test_a_trained_tokenizer_is_bert_like(tmp_path):
    tokenizer = make_corpus(tmp_path).tokenizer
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert len(tokenizer) <= VOCAB_SIZE and len(tokenizer) == len(tokenizer.get_vocab())
    assert tokenizer.tokenize("ABC\u00e9 \u4e2d")[0].islower() and "[UNK]" in tokenizer.tokenize("ABC \u4e2d")
    encoded = tokenizer("abc")["input_ids"]
    assert (encoded[0], encoded[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert set(tokenizer.all_special_ids) == {0, 1, 2, 3, 4}, "the alphabet is ordinary"
    assert tokenizer.decode(tokenizer("p abc")["input_ids"], skip_special_tokens=True) == "p abc"


def test_saved_tokenizers_load_as_the_same(tmp_path):
    tokenizer = make_corpus(tmp_path).tokenizer
    tokenizer.save_pretrained(tmp_path / "hf")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((tmp_path / "hf" / "tokenizer.json").read_bytes())
    (tmp_path / "words").mkdir()
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(words) + "\n")
    for name in ("hf", "bare", "bare/tokenizer.json", "words", "words/vocab.txt"):
        loaded = load_tokenizer(str(tmp_path / name))
        assert same_tokenizer(loaded, tokenizer), name
        assert loaded.tokenize("Number 5") == tokenizer.tokenize("Number 5")
    other = make_corpus(tmp_path, vocab_size=200).tokenizer
    assert not same_tokenizer(other, tokenizer)


def test_local_tokenizers_do_not_touch_the_network(tmp_path, monkeypatch):
    make_corpus(tmp_path).tokenizer.save_pretrained(tmp_path / "hf")
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("network"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *args: pytest.fail("network"))
    load_tokenizer(str(tmp_path / "hf"))


def test_missing_special_tokens_are_added(tmp_path):
    bare = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "<s>": 2, "</s>": 3}, unk_token="<unk>")
    )
    bare.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id) == (2, 3)
    assert {tokenizer.pad_token_id, tokenizer.mask_token_id} == {4, 5} and len(tokenizer) == 6
    pair = tokenizer("a", "a", return_token_type_ids=True)
    assert (pair["input_ids"], pair["token_type_ids"]) == ([2, 1, 3, 1, 3], [0, 0, 0, 1, 1]), (
        "around a text, as in BERT"
    )
    ids = [("<s>", 2), ("</s>", 3)]
    bare.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", pair=None, special_tokens=ids)
    bare.save(str(tmp_path / "tokenizer.json"))  # for a text alone
    assert load_tokenizer(str(tmp_path / "tokenizer.json"))("a", "a")["input_ids"] == [2, 1, 3, 1, 3]
    strict = tokenizers.Tokenizer(tokenizers.models.WordLevel({"b": 0}, unk_token="[UNK]"))
    strict.save(str(tmp_path / "tokenizer.json"))  # it cannot read any text but "b"
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer("b")["input_ids"] == [tokenizer.cls_token_id, 0, tokenizer.sep_token_id]


def test_a_tokenizer_does_not_cut_or_pad_because_it_was_saved_so(tmp_path):
    tokenizer = make_corpus(tmp_path).tokenizer
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    tokenizer.save_pretrained(tmp_path / "hf")
    plain, loaded = (load_tokenizer(str(tmp_path / name)) for name in ("plain", "hf"))
    assert tokenizer_digest(loaded) == tokenizer_digest(plain)
    assert len(loaded("Number 5 " * 20)["input_ids"]) > 40


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece(tmp_path, kind):
    import sentencepiece

    texts = make_texts(300)
    (tmp_path / "t.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=120,
        model_type=kind,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    tokenizer = load_tokenizer(str(tmp_path / "spm.model"))
    for t in [*texts[:20], "a  b", "unknown: \u4e2d."]:
        assert tokenizer(t, add_special_tokens=False)["input_ids"] == original.encode(t), t
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(120)] == [original.id_to_piece(i) for i in range(120)]
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id) == (original.bos_id(), original.eos_id())
    assert sorted([tokenizer.pad_token_id, tokenizer.mask_token_id]) == [120, 121]
    corpus = make_corpus(tmp_path, tokenizer=str(tmp_path / "spm.model"))
    assert next(make_batches(corpus)).rows == 12 * round(0.15 * SEQ_LEN)
    tokenizer.save_pretrained(tmp_path / "hf")
    saved = load_tokenizer(str(tmp_path / "hf"))
    assert same_tokenizer(saved, tokenizer)
    first, second = (original.encode(t) for t in texts[:2])
    cls, sep = [original.bos_id()], [original.eos_id()]
    assert saved(*texts[:2])["input_ids"] == cls + first + sep + second + sep


SPACES = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
SENTENCEPIECE_OPTIONS = {
    "spaces behind words": {"treat_whitespace_as_suffix": True},
    "pieces of several words": {"split_by_whitespace": False},
    "all spaces kept": SPACES,
    "all spaces kept, as LLaMA": SPACES
    | {"normalization_rule_name": "identity", "byte_fallback": True, "vocab_size": 500},
    "no prefix": {"add_dummy_prefix": False},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "the user's own pieces": {"user_defined_symbols": ["<sep>", "@@", "ab"]},
}


def train_sentencepiece(folder, **options):
    import sentencepiece

    lines = [t.replace(" ", "    ", 3) if "remove_extra_whitespaces" in options else t for t in make_texts(300)]
    (folder / "t.txt").write_text("\n".join(lines))
    settings = {"vocab_size": 200, "model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "t.txt"), model_prefix=str(folder / "spm"), **settings)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model")), lines


@pytest.mark.parametrize("options", SENTENCEPIECE_OPTIONS.values(), ids=SENTENCEPIECE_OPTIONS)
def test_options_of_sentencepiece_give_its_tokens(tmp_path, options):
    original, lines = train_sentencepiece(tmp_path, **options)
    tokenizer = load_tokenizer(str(tmp_path / "spm.model"))
    for line in [*lines[:50], " one before", "and behind  ", "ab<sep>cd @@ef", "x \u4e2d", "Upper"]:
        assert tokenizer(line, add_special_tokens=False)["input_ids"] == original.encode(line), line


def test_the_score_of_a_merge_decides_and_not_its_place(tmp_path):
    """As in Mistral's model, whose pieces of spaces stand first and come last."""
    from sentencepiece import sentencepiece_model_pb2

    train_sentencepiece(tmp_path)
    proto = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "spm.model").read_bytes())
    first = proto.pieces.pop(3)
    first.score = -1e9
    proto.pieces.append(first)
    (tmp_path / "spm.model").write_bytes(proto.SerializeToString())
    load_tokenizer(str(tmp_path / "spm.model"))
    proto.pieces.insert(3, proto.pieces.pop())
    (tmp_path / "spm.model").write_bytes(proto.SerializeToString())
    load_tokenizer(str(tmp_path / "spm.model"))


def hub_like(folder, model, kind):
    """A folder with a SentencePiece model and no tokenizer.json, which transformers makes a tokenizer of."""
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    return str(folder)


def test_a_folder_s_sentencepiece_model_is_compared_too(tmp_path):
    train_sentencepiece(tmp_path, treat_whitespace_as_suffix=True)
    folder = hub_like(tmp_path / "hub", tmp_path / "spm.model", "LlamaTokenizer")
    with pytest.raises(ValueError, match=r"hub has an option .* give --tokenizer .*hub/tokenizer\.model") as error:
        load_tokenizer(folder)
    error_line(error)
    load_tokenizer(folder + "/tokenizer.model")


@needs_data("sentencepiece")
@pytest.mark.parametrize("name", ["mistral_v1_bpe32k", "spm_test_unigram1k"])
def test_folders_of_real_sentencepiece_models(name, tmp_path):
    model = DATA / "sentencepiece" / f"{name}.model"
    load_tokenizer(hub_like(tmp_path / "plain", model, "PreTrainedTokenizerFast"))
    with pytest.raises(ValueError, match="has an option of SentencePiece"):
        load_tokenizer(hub_like(tmp_path / "llama", model, "LlamaTokenizer"))


def test_an_option_that_cannot_be_followed_is_refused(tmp_path, monkeypatch):
    from kd_core.text import tokenizer as module

    train_sentencepiece(tmp_path, treat_whitespace_as_suffix=True)
    normalizers = module._sentencepiece_normalizers
    monkeypatch.setattr(module, "_sentencepiece_normalizers", lambda *of: normalizers(*of)[:-2])
    with pytest.raises(
        ValueError, match=r"spm.model has an option of SentencePiece .* lines have other tokens"
    ) as error:
        load_tokenizer(str(tmp_path / "spm.model"))
    error_line(error)


@pytest.mark.parametrize("line", ["in the middle", "at the end", "blank"])
def test_a_vocabulary_with_a_repeated_line_is_refused(tmp_path, line):
    """Its ids go beyond the number of its tokens, and so beyond the embedding."""
    vocabulary = make_corpus(tmp_path).tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.get)
    twice = {"in the middle": [*words[:200], words[100], *words[200:]], "at the end": [*words, words[100]]}
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "vocab.txt").write_text("\n".join(twice.get(line, [*words, "", "", ""])))
    first = len(words) + 1 if line == "blank" else 101
    with pytest.raises(
        ValueError, match=rf"none has id {first - 1}; if line {first} of its vocab.txt stands there twice"
    ):
        load_tokenizer(str(tmp_path / "v"))
    content = json.loads(make_corpus(tmp_path).tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"][words[-1]] = 10**6
    (tmp_path / "gap.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="with ids up to 1000000, and none has id") as error:
        load_tokenizer(str(tmp_path / "gap.json"))
    error_line(error)


@pytest.mark.parametrize("first", [0x10D0, 0x1F600])
def test_text_that_the_tokenizer_does_not_know(tmp_path, capsys, first):
    (tmp_path / "t").mkdir()
    make_corpus(tmp_path).tokenizer.save_pretrained(tmp_path / "t")
    known = make_texts(300)
    foreign = [t.translate({97 + i: first + i for i in range(26)}) for t in known]
    tokenizer = str(tmp_path / "t")
    for name, train, validation in (("training", foreign, known), ("validation", known, foreign)):
        write_jsonl(tmp_path / name / "train.jsonl", train)
        write_jsonl(tmp_path / name / "val.jsonl", validation)
        with pytest.raises(ValueError, match=rf"{name} text: \d+% of the tokens are unknown to the tokenizer") as error:
            prepare(str(tmp_path / name), tokenizer=tokenizer, vocab_size=0, seq_len=SEQ_LEN)
        error_line(error)
    capsys.readouterr()
    write_jsonl(tmp_path / "some.jsonl", known * 3 + foreign)
    prepare(str(tmp_path / "some.jsonl"), tokenizer=tokenizer, vocab_size=0, seq_len=SEQ_LEN, progress=True)
    assert "% of the tokens are unknown to the tokenizer" in capsys.readouterr().err


def no_network(monkeypatch):
    """A hub that cannot be reached; waiting for it to come back, as its client does for a minute, fails the test."""

    def wait(seconds):
        pytest.fail(f"waits {seconds} s for a hub that is not there")

    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)


TOKENIZER_ERRORS = {
    "nothing there": ("./nowhere", FileNotFoundError, "no such file"),
    "folder without tokenizer": ("empty", ValueError, "holds no tokenizer"),
    "suffix": ("x.bin", ValueError, "unsupported"),
    "broken json": ("broken.json", ValueError, "not a tokenizer.json"),
    "other json": ("other.json", ValueError, "not a tokenizer.json"),
    "broken model": ("broken.model", ValueError, "not a SentencePiece model"),
    "hub without network": ("nobody/nothing", ValueError, "cannot be reached"),
}


@pytest.mark.parametrize("case", TOKENIZER_ERRORS)
def test_tokenizer_errors(tmp_path, monkeypatch, case):
    name, kind, words = TOKENIZER_ERRORS[case]
    no_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.bin").write_text("")
    (tmp_path / "broken.json").write_text('{"model": ')
    (tmp_path / "other.json").write_text('{"model": {"type": "Strange"}}')
    (tmp_path / "broken.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(kind) as error:
        load_tokenizer(name)
    assert f"--tokenizer {name}" in error_line(error) and words in error_line(error)


def test_a_vocabulary_too_small_for_the_alphabet_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--vocab-size 20 is too small.*at least") as error:
        make_corpus(tmp_path, vocab_size=20)
    error_line(error)


# --------------------------------------------------------------------------------------------------------- data errors


def prepare_error(source, kind=ValueError, **settings):
    with pytest.raises(kind) as error:
        prepare(str(source), **{"tokenizer": None, "vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN} | settings)
    line = error_line(error)
    assert line.startswith("--"), line
    return line


DAMAGED = {
    "truncated.jsonl.gz": (lambda good: gzip.compress(good)[:-20], "cannot be read"),
    "truncated.jsonl.xz": (lambda good: lzma.compress(good)[:-20], "cannot be read"),
    "flipped.jsonl.gz": (lambda good: gzip.compress(good)[:-8] + b"12345678", "cannot be read"),
    "not_gzip.jsonl.gz": (lambda good: good, "cannot be read"),
    "not_xz.txt.xz": (lambda good: good, "cannot be read"),
    "not_parquet.parquet": (lambda good: good, "cannot be read"),
    "latin.txt": (
        lambda good: b"\n\n".join([b"good"] * 20) + "caf\u00e9".encode("latin-1"),
        "not UTF-8 text at byte 121",
    ),
    "broken.jsonl": (lambda good: good + b'{"text": "x\n', "line 21 is not JSON"),
    "broken.json": (lambda good: b'[{"text": "x"},\n{]', "is not JSON"),
    "number.jsonl": (lambda good: good + b"5\n", 'line 21 needs a field "text"'),
    "untitled.jsonl": (lambda good: good + b'{"body": "x"}\n', "it has only ['body']"),
    "null.json": (lambda good: b'[{"text": "x"}, {"text": null}]', "record 2 needs a field"),
    "surrogate.jsonl": (lambda good: b'{"text": "\\ud800"}\n', "line 1 has a text that is not valid Unicode"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_among_good_ones_is_named(tmp_path, name):
    damage, words = DAMAGED[name]
    good = write_jsonl(tmp_path / "data" / "a.jsonl", make_texts(20))
    (tmp_path / "data" / name).write_bytes(damage(good.read_bytes()))
    line = prepare_error(tmp_path / "data")
    assert name in line and words in line, line


def test_parquet_needs_a_text_column(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    assert "no column 'text', only ['body']" in prepare_error(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    assert "row 2" in prepare_error(path)


def test_missing_and_empty_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for missing in ("nowhere", "./no/where", "folder/nothing", "no/where.txt", "/no/where"):
        assert missing.split("/")[-1] in prepare_error(missing, FileNotFoundError)
    assert "no text files" in prepare_error("folder")
    (tmp_path / "x.csv").write_text("x")
    assert "unsupported" in prepare_error("x.csv")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "no training documents" in prepare_error("empty.txt")
    tokenizer = make_corpus(tmp_path).tokenizer
    tokenizer.save_pretrained(tmp_path / "hf")
    assert "no validation document" in prepare_error("empty.txt", tokenizer="hf")


def test_too_little_text(tmp_path):
    write_jsonl(tmp_path / "one.jsonl", [t for t in make_texts(9) if documents.text_digest(t) % 50])
    assert "no validation document" in prepare_error(tmp_path / "one.jsonl")
    write_jsonl(tmp_path / "short" / "train.jsonl", make_texts(4))
    write_jsonl(tmp_path / "short" / "val.jsonl", ["a"])
    assert "validation documents, which do not fill" in prepare_error(tmp_path / "short")
    assert "training documents, which do not fill" in prepare_error(tmp_path / "short", seq_len=10_000)


@pytest.mark.parametrize("seq_len", [0, 7, 65_537])
def test_sequence_lengths(tmp_path, seq_len):
    assert "--seq-len must be in" in prepare_error(tmp_path, seq_len=seq_len)


def test_hub_data_without_network_fails_fast(tmp_path, monkeypatch):
    no_network(monkeypatch)
    make_corpus(tmp_path).tokenizer.save_pretrained(tmp_path / "hf")
    assert "--data nobody/nothing" in prepare_error("nobody/nothing")
    assert "--tokenizer google-bert/bert-base-uncased" in prepare_error("c4")
    assert "c4-validation" in prepare_error("c4", tokenizer=str(tmp_path / "hf"))


def test_hub_data(tmp_path, monkeypatch):
    import datasets

    texts = make_texts(300)
    made = {
        "train": datasets.Dataset.from_dict({"text": texts[:250], "id": range(250)}),
        "test": datasets.Dataset.from_dict({"text": ["never"] * 5}),
    }
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: made)
    pairs = list(documents.hub_documents("owner/name:config"))
    assert [t for _, t in pairs] == texts[:250] and of_split(pairs, "validation")
    made["validation"] = datasets.Dataset.from_dict({"text": texts[250:] + texts[:2]})
    pairs = list(documents.hub_documents("owner/name"))
    assert of_split(pairs, "validation") == texts[250:] + texts[:2]
    assert of_split(pairs, "train") == texts[2:250]
    made["train"] = made["train"].rename_column("text", "body")
    with pytest.raises(ValueError, match="no column 'text'"):
        list(documents.hub_documents("owner/name"))


# ------------------------------------------------------------------------------------------------------------- masking


@pytest.fixture
def masked(tmp_path):
    corpus = make_corpus(tmp_path, count=3000)
    rows = np.array(corpus.rows(0)[:4000])
    ids = np.arange(len(rows), dtype=np.int64)

    def mask(rows, ids, **settings):
        settings = {"seed": 3, "epoch": 0, "fraction": 0.25, "tokenizer": corpus.tokenizer} | settings
        (micro,) = text.masked_micro_batches(rows, ids, micro_batch_size=len(rows), **settings)
        return micro.input_ids.numpy(), micro.positions.numpy(), micro.labels.numpy()

    return corpus, rows, ids, mask


def test_mask_statistics(masked):
    corpus, rows, ids, mask = masked
    input_ids, positions, labels = mask(rows, ids)
    flat, original = input_ids.reshape(-1), rows.reshape(-1).astype(np.int64)
    k = round(0.25 * SEQ_LEN)
    assert input_ids.dtype == positions.dtype == labels.dtype == np.int64
    assert positions.shape == labels.shape == (len(rows) * k,)
    assert (np.diff(positions) > 0).all(), "ascending, none twice"
    assert (labels == original[positions]).all()
    untouched = np.ones(len(flat), bool)
    untouched[positions] = False
    assert (flat[untouched] == original[untouched]).all()
    special = corpus.tokenizer.all_special_ids
    assert not np.isin(labels, special).any()
    is_mask, is_kept = flat[positions] == corpus.tokenizer.mask_token_id, flat[positions] == original[positions]
    changed = flat[positions][~is_mask & ~is_kept]
    assert abs(is_mask.mean() - 0.8) < 0.01 and abs(is_kept.mean() - 0.1) < 0.01
    assert not np.isin(changed, special).any()
    assert len(np.unique(changed)) > 0.9 * (len(corpus.tokenizer) - 5), "random tokens come from the whole vocabulary"
    ordinary = np.isin(rows, special, invert=True)
    chosen = np.zeros_like(ordinary)
    chosen.reshape(-1)[positions] = True
    rate = chosen.sum(0)[1:-1] / ordinary.sum(0)[1:-1]
    assert rate.std() < 0.02, "no position is preferred"


def test_masks_are_pure_functions_of_seed_epoch_and_sample(masked):
    _, rows, ids, mask = masked
    whole = mask(rows[:64], ids[:64])
    again = mask(rows[:64], ids[:64])
    assert all((a == b).all() for a, b in zip(whole, again, strict=True))
    k = round(0.25 * SEQ_LEN)
    order = np.random.default_rng(0).permutation(64)
    shuffled = mask(rows[order], ids[order])
    assert (shuffled[0] == whole[0][order]).all()
    assert (shuffled[2].reshape(-1, k) == whole[2].reshape(-1, k)[order]).all()
    for other in (
        mask(rows[:64], ids[:64], seed=4),
        mask(rows[:64], ids[:64], epoch=1),
        mask(rows[:64], ids[:64] + 64),
    ):
        assert (other[1] == whole[1]).mean() < 0.5
    epochs = np.array([0, 1] * 32)
    mixed = mask(rows[:64], ids[:64], epoch=epochs)
    assert (mixed[0][::2] == whole[0][::2]).all()
    assert (mixed[0][1::2] == mask(rows[:64], ids[:64], epoch=1)[0][1::2]).all()


def test_rows_with_few_ordinary_tokens_keep_the_shape(masked):
    corpus, rows, ids, mask = masked
    poor = rows[:2].copy()
    poor[0, 3:] = corpus.tokenizer.sep_token_id
    input_ids, positions, labels = mask(poor, ids[:2])
    k = round(0.25 * SEQ_LEN)
    assert labels.shape == (2 * k,) and (labels[:k] != -100).sum() == 2 and (labels[k:] != -100).all()
    assert len(np.unique(positions)) == 2 * k
    assert (input_ids[0, 3:] == corpus.tokenizer.sep_token_id).all(), "special tokens are never changed"


def test_splitmix64_is_the_published_one():
    # The first outputs of the reference generator with state 1234567.
    state = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert hashing.splitmix64(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


# ------------------------------------------------------------------------------------------------------------- batches


def columns(steps):
    """Sample ids and inputs of several steps as one array each."""
    micros = [micro for step in steps for micro in step.micro_batches]
    return torch.cat([m.sample_ids for m in micros]), torch.cat([m.input_ids for m in micros])


def test_an_epoch_visits_every_row_once_and_epochs_differ(tmp_path):
    corpus = make_corpus(tmp_path)
    num_rows = len(corpus.rows(0))
    steps = -(-2 * num_rows // 12)
    ids = columns(itertools.islice(make_batches(corpus), steps))[0].numpy()
    first, second = ids[:num_rows], ids[num_rows : 2 * num_rows]
    assert sorted(first) == sorted(second) == list(range(num_rows))
    assert (first != second).mean() > 0.9
    other_seed = columns(itertools.islice(make_batches(corpus, seed=2), 3))[0].numpy()
    assert (other_seed != first[:36]).mean() > 0.9


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 12), (2, 3), (4, 1), (3, 4)])
def test_a_global_batch_does_not_depend_on_its_split(tmp_path, world_size, micro_batch_size):
    corpus = make_corpus(tmp_path)
    end = Position(0, 0, len(corpus.rows(0)) - 5)  # the first batch runs over the epoch's end
    whole = list(itertools.islice(make_batches(corpus, position=end), 3))
    split = [
        list(
            itertools.islice(
                make_batches(corpus, position=end, rank=r, world_size=world_size, micro_batch_size=micro_batch_size), 3
            )
        )
        for r in range(world_size)
    ]
    for step in range(3):
        ids, inputs = columns([ranks[step] for ranks in split])
        expected_ids, expected_inputs = columns([whole[step]])
        assert torch.equal(ids, expected_ids) and torch.equal(inputs, expected_inputs)
        assert sum(ranks[step].rows for ranks in split) == whole[step].rows
        assert all(len(ranks[step].micro_batches) == 12 // world_size // micro_batch_size for ranks in split)
        for micro in split[-1][step].micro_batches:
            assert micro.input_ids.shape == (micro_batch_size, SEQ_LEN)
            at = micro.input_ids.view(-1)[micro.positions]
            assert ((at == micro.labels) | (at == corpus.tokenizer.mask_token_id) | (at > 4)).all()


def test_resuming_anywhere_equals_going_on(tmp_path):
    corpus = make_corpus(tmp_path, count=120)
    steps = list(itertools.islice(make_batches(corpus), 40))
    assert steps[-1].position.epoch >= 1
    for at in range(39):
        saved = json.loads(json.dumps(steps[at].position))
        resumed = next(make_batches(corpus, position=Position(*saved)))
        assert all(torch.equal(a, b) for a, b in zip(columns([resumed]), columns([steps[at + 1]]), strict=True))
        assert resumed.position == steps[at + 1].position


def test_steps_end_the_iterator(tmp_path):
    assert len(list(make_batches(make_corpus(tmp_path), steps=4))) == 4


def test_impossible_batches_are_refused(tmp_path):
    corpus = make_corpus(tmp_path)
    for wrong in ({"global_batch_size": 10}, {"world_size": 5}, {"micro_batch_size": 0}):
        with pytest.raises(ValueError, match="--global-batch-size must be a multiple") as error:
            make_batches(corpus, **wrong)
        error_line(error)
    with pytest.raises(ValueError, match="--global-batch-size must be at most") as error:
        make_batches(corpus, global_batch_size=30_000)
    assert "--data corpus.jsonl has" in error_line(error)
    for fraction in (0, 0.001, 1, float("nan")):
        with pytest.raises(ValueError, match="--mask-fraction"):
            make_batches(corpus, mask_fraction=fraction)
    with pytest.raises(ValueError, match="--seed"):
        make_batches(corpus, seed=-1)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 3), (3, 1), (50, 4)])
def test_validation_shares_are_disjoint_complete_and_of_equal_shapes(tmp_path, world_size, micro_batch_size):
    corpus = make_corpus(tmp_path)
    shares = [
        list(text.validation_batches(corpus, micro_batch_size=micro_batch_size, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({tuple(m.input_ids.shape for m in share) for share in shares}) == 1
    (everything,) = text.validation_batches(corpus, micro_batch_size=10_000, rank=0, world_size=1)
    k = round(0.15 * SEQ_LEN)
    expected = dict(zip(everything.sample_ids.tolist(), everything.labels.view(-1, k).tolist(), strict=True))
    assert sorted(expected) == list(range(len(corpus.validation)))
    found = {}
    for micro in itertools.chain(*shares):
        for number, labels in zip(micro.sample_ids.tolist(), micro.labels.view(-1, k).tolist(), strict=True):
            if labels != [IGNORE_INDEX] * k:
                assert number not in found
                found[number] = labels
    assert found == expected


def test_prefetch():
    assert list(prefetch(iter(range(100)))) == list(range(100))

    def failing():
        yield 1
        raise ValueError("from the thread")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="from the thread"):
        next(items)

    taken = []
    endless = prefetch((taken.append(i) or i for i in itertools.count()), depth=3)
    assert [next(endless), next(endless)] == [0, 1]
    time.sleep(0.3)
    assert len(taken) <= 2 + 3 + 1, "bounded"
    endless.close()
    count = len(taken)
    time.sleep(0.3)
    assert len(taken) == count, "the thread has ended"


def test_batches_take_no_python_call_a_row(tmp_path):
    corpus, counts = make_corpus(tmp_path, count=3000, seq_len=128), []
    for micro in (32, 64):
        batches = make_batches(corpus, global_batch_size=8 * micro, micro_batch_size=micro)
        next(batches)
        calls = collections.Counter()
        sys.setprofile(lambda _, event, __, calls=calls: calls.update([event]))
        try:
            for _ in range(3):
                next(batches)
        finally:
            sys.setprofile(None)
        counts.append(calls["call"])
    assert counts[0] > 0 and counts[1] - counts[0] < 32, f"{counts} calls for batches of 256 rows and of 512"


# ------------------------------------------------------------------------------------------------------------------ c4


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty copy of the hub's cache with C4 in it, as huggingface_hub lays it out; returns a function to add files."""
    root = tmp_path / "hub"
    repository = root / "datasets--allenai--c4"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(root))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)

    def add(filename, texts):
        path = repository / "snapshots" / ("0" * 40) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps({"text": t, "url": "u", "timestamp": "t"}) + "\n" for t in texts)
        path.write_bytes(gzip.compress(content.encode()))

    return add


def open_c4(tmp_path, hub, validation):
    make_corpus(tmp_path).tokenizer.save_pretrained(tmp_path / "tokenizer")
    hub(c4.VALIDATION_FILE, validation)
    return prepare("c4", tokenizer=str(tmp_path / "tokenizer"), vocab_size=0, seq_len=SEQ_LEN)


def wait_for_workers():
    for worker in c4._workers:
        worker.wait(timeout=60)


def test_c4_from_end_to_end(tmp_path, hub, cache):
    validation = make_texts(50, seed=100)
    corpus = open_c4(tmp_path, hub, validation)
    assert corpus.num_shards == 1024 and len(corpus.validation) > 1
    shards = [int(s) for s in shard_order(1, 0, 1024)[:5]]
    for shard in shards:
        hub(c4.train_file(shard), [*make_texts(20, seed=shard), validation[3]])
    rows_of = lambda shard: cache.glob(f"c4-*/train-{shard:05d}.bin")
    # 20 documents of some 100 tokens are at least 50 rows: 5 steps of 12 end in the first or the second shard.
    first = list(make_batches(corpus, steps=1))
    wait_for_workers()
    assert [len(list(rows_of(shard))) for shard in shards] == [1, 0, 0, 0, 0], "no further than needed"
    batches = make_batches(corpus, steps=100)
    steps = [next(batches)]
    wait_for_workers()
    assert [len(list(rows_of(shard))) for shard in shards] == [1, 1, 1, 0, 0], "ahead of the reader"
    num_rows = [len(corpus.rows(shard)) for shard in shards[:2]]
    while steps[-1].position.shard < 2:
        steps.append(next(batches))
    ids, inputs = columns(steps)
    assert torch.equal(inputs[:12], columns(first)[1])
    assert set((ids[: num_rows[0]] >> 32).tolist()) == {shards[0]}
    assert set((ids[num_rows[0] : sum(num_rows)] >> 32).tolist()) == {shards[1]}
    assert len(set(ids.tolist())) == len(ids)
    resumed = make_batches(corpus, position=steps[-2].position, steps=1)
    assert torch.equal(columns(resumed)[1], columns(steps[-1:])[1])
    # A validation document is not trained on.
    packer = packing.MaskedPacker.of(corpus.tokenizer, SEQ_LEN)
    expected = packer.write(tmp_path / "expected", make_texts(20, seed=shards[0]))
    assert num_rows[0] == expected
    assert corpus.rows(shards[0]).tobytes() == (tmp_path / "expected").read_bytes()


def test_c4_worker_errors_reach_the_reader(tmp_path, hub):
    corpus = open_c4(tmp_path, hub, make_texts(50, seed=100))
    with pytest.raises(ValueError, match=r"--data.*c4-train.00007-of-01024") as error:
        corpus.rows(7)
    error_line(error)
    hub(c4.train_file(7), make_texts(20))
    assert len(corpus.rows(7)) > 1, "the next attempt is not spoilt by the first"


@pytest.mark.parametrize("damaged", ["train-00007.bin", "train-00007.sha256", "validation_digests.npy"])
def test_c4_payloads_are_not_run_where_a_shard_is_repaired(damaged, tmp_path, hub, cache, monkeypatch):
    monkeypatch.setattr(c4, "_sound", set())
    corpus, mark = open_c4(tmp_path, hub, make_texts(50, seed=100)), tmp_path / "was_run"
    hub(c4.train_file(7), make_texts(20))
    whole = np.array(corpus.rows(7))
    folder = next(cache.glob("c4-*/train-00007.bin")).parent
    if damaged.endswith(".npy"):
        np.save(folder / damaged, np.array([Harmful(str(mark))], dtype=object), allow_pickle=True)
        (folder / "train-00007.bin").unlink()  # or nobody reads the digests
    else:
        (folder / damaged).write_bytes(pickle.dumps(Harmful(str(mark))))
    c4._sound.clear()
    if damaged == "train-00007.bin":
        assert np.array_equal(corpus.rows(7), whole)
    else:
        with pytest.raises(ValueError) as error:
            corpus.rows(7)
        error_line(error)
    assert not mark.exists()


def test_c4_workers_are_shared_and_replaced_when_killed(tmp_path, hub, cache):
    corpus = open_c4(tmp_path, hub, make_texts(50, seed=100))
    hub(c4.train_file(7), make_texts(20))
    wait_for_workers()  # another test's may still be exiting after its shard is there
    corpus.request(7)
    corpus.request(7)
    assert len([w for w in c4._workers if w.poll() is None]) == 1, "one worker for one shard"
    c4._workers[-1].kill()
    c4._workers[-1].wait()
    assert not list(cache.glob("c4-*/train-00007.bin"))
    assert len(corpus.rows(7)) > 1


# ----------------------------------------------------------------------------------------------------- embedded, real data


def test_embedded_text(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "EMBEDDED_PACKAGES", ("networkx", "no_such_package"))
    loaded = set(sys.modules)
    assert "networkx" in documents.embedded_key() and "no_such" not in documents.embedded_key()
    documents.write_embedded(tmp_path / "a.jsonl")
    count = documents.write_embedded(tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert "networkx" not in set(sys.modules) - loaded
    texts = [t for _, t in read(tmp_path / "a.jsonl")]
    assert len(texts) == count and sum(map(len, texts)) > 1_500_000
    paragraphs = [p for t in texts for p in t.split("\n")]
    assert len(set(paragraphs)) == len(paragraphs) and min(map(len, texts)) >= 150
    assert open_source(None, False).name == open_source("embedded", False).name == "embedded"


@needs_data("wikitext2")
def test_real_text(capsys):
    corpus = prepare(
        str(DATA / "wikitext2" / "valid.txt.gz"), tokenizer=None, vocab_size=4096, seq_len=64, progress=True
    )
    assert len(corpus.rows(0)) > 3000 and len(corpus.validation) > 20
    rows = np.array(corpus.rows(0))
    assert (rows == corpus.tokenizer.unk_token_id).mean() < 0.002


@needs_data("c4_sample")
def test_real_c4(tmp_path, hub):
    texts = list(documents.read_file(DATA / "c4_sample" / "c4_en_1000.jsonl.gz"))
    corpus = open_c4(tmp_path, hub, texts[:200])
    shard = int(shard_order(5, 0, 1024)[0])
    hub(c4.train_file(shard), texts[200:])
    batches = make_batches(corpus, seed=5, steps=3)
    assert len(list(batches)) == 3
    assert len(corpus.rows(shard)) > 5000
