"""Causal text: packed rows, their marks, labels and positions; tokenizers, vocabularies; prompts and responses."""

import itertools
import json

import numpy as np
import pytest
import torch

from kd_core.text import c4, causal, packing
from kd_core.text.corpus import IGNORE_INDEX
from kd_core.text.flags import CausalTextFlags
from kd_core.text.order import Position
from tests.unit.test_text import (
    cache,  # noqa: F401
    finish,
    hub,  # noqa: F401
    make_texts,
    of_split,
    read,
    run_python,
    wait_for_workers,
    write_jsonl,
)

T = 32


def make(tmp_path, count=400, **flags):
    source = tmp_path / "corpus.jsonl"
    if not source.exists():
        write_jsonl(source, make_texts(count))
    return causal.build(CausalTextFlags(**{"data": str(source), "vocab_size": 500, "seq_len": T} | flags))


def stream_of(tmp_path, tokenizer, split="train"):
    """The documents' ids, each between what the tokenizer puts before it and EOS."""
    texts = of_split(read(tmp_path / "corpus.jsonl"), split)
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]


def documents_of(rows):
    """The documents of rows as lists of (id, marks), in order."""
    found = []
    for row in rows:
        starts = [*np.flatnonzero(row["marks"] & packing.BEGINS), len(row)]
        found += [row[a:b] for a, b in itertools.pairwise(starts)]
    return found


# ------------------------------------------------------------------------------------------------------- rows and marks


def test_packed_rows_are_the_stream_of_documents_with_eos_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 7)  # many batches, so that rows run over their ends
    corpus = make(tmp_path)
    documents = stream_of(tmp_path, corpus.tokenizer)
    stream = list(itertools.chain(*documents))
    rows = corpus.rows(0)
    assert rows["id"].dtype == np.uint16 and rows.shape == (len(stream) // T, T)
    assert rows["id"].reshape(-1).tolist() == stream[: rows.size]
    begins = np.zeros(len(stream), bool)
    begins[np.cumsum([0, *map(len, documents)])[:-1]] = True
    begins = begins[: rows.size].reshape(rows.shape)
    begins[:, 0] = True
    expected = np.where(begins, packing.BEGINS, packing.LABEL)
    assert (rows["marks"] == expected).all(), (
        "every token but a document's or a row's first is a label; none is padding"
    )


def test_labels_are_the_next_token_of_the_same_document(tmp_path):
    corpus = make(tmp_path)
    rows = corpus.rows(0)[:50]
    made = causal.batch(rows["id"], rows["marks"])
    assert made.attention_mask is None
    for n in range(len(rows)):
        document = position = -1
        of_document = []
        for t in range(T):
            begins = rows["marks"][n, t] & packing.BEGINS
            document, position = document + bool(begins), 0 if begins else position + 1
            of_document.append(document)
            assert made.position_ids[n, t] == position
        for t in range(T):
            same = t + 1 < T and of_document[t] == of_document[t + 1]
            assert made.labels[n, t] == (int(rows["id"][n, t + 1]) if same else IGNORE_INDEX)
    assert torch.equal(made.positions, torch.nonzero(made.labels.view(-1) != IGNORE_INDEX).view(-1))
    assert made.input_ids.dtype == made.labels.dtype == made.position_ids.dtype == torch.int64


def test_without_packing_each_document_has_a_row(tmp_path):
    texts = [text for n in range(400) for text in make_texts(1, seed=n, words=3 + n % 9)]
    write_jsonl(tmp_path / "corpus.jsonl", texts)
    dropped, cut = (make(tmp_path, packing=False, on_too_long=what) for what in ("drop", "cut"))
    documents = stream_of(tmp_path, cut.tokenizer)
    short = [ids for ids in documents if len(ids) <= T]
    assert 0 < len(short) < len(documents) == len(cut.rows(0)) and len(dropped.rows(0)) == len(short)
    pad, label = cut.tokenizer.pad_token_id, packing.LABEL
    for row, ids in [*zip(dropped.rows(0), short, strict=True), *zip(cut.rows(0), documents, strict=True)]:
        ids = ids[:T]
        assert row["id"].tolist() == ids + [pad] * (T - len(ids))
        marks = [packing.BEGINS] + [label] * (len(ids) - 1) + [packing.PADDING] * (T - len(ids))
        assert row["marks"].tolist() == marks
    made = causal.batch(dropped.rows(0)["id"], dropped.rows(0)["marks"])
    assert made.attention_mask.sum(1).tolist() == [len(ids) for ids in short]
    assert (made.labels != IGNORE_INDEX).sum(1).tolist() == [len(ids) - 1 for ids in short]
    assert not ((made.labels == pad) & (made.labels != IGNORE_INDEX)).any()
    assert dropped.fingerprint != cut.fingerprint != make(tmp_path).fingerprint


def test_a_text_that_mentions_eos_does_not_end_there(tmp_path):
    tokenizer = make(tmp_path).tokenizer
    packer = packing.CausalPacker.of(tokenizer, T)
    packer.write(tmp_path / "rows", ["a <|endoftext|> b " * 20])
    assert tokenizer.eos_token_id not in packer.open(tmp_path / "rows")["id"]


def test_what_a_tokenizer_puts_before_a_text_begins_documents(tmp_path):
    corpus = make(tmp_path, tokenizer="bytes")
    bos, eos = corpus.tokenizer.bos_token_id, corpus.tokenizer.eos_token_id
    rows = corpus.rows(0)
    first = stream_of(tmp_path, corpus.tokenizer)[0]
    assert first[0] == bos and rows["id"].reshape(-1)[: len(first)].tolist() == first
    starts = rows["marks"][:, 1:] & packing.BEGINS != 0
    assert (rows["id"][:, 1:][starts] == bos).all() and (rows["id"][:, :-1][starts] == eos).all()


# ---------------------------------------------------------------------------------------------------- order and resume


def make_batches(corpus, **settings):
    defaults = {"seed": 1, "global_batch_size": 12, "micro_batch_size": 3, "rank": 0, "world_size": 1}
    return causal.CausalBatches(corpus, **defaults | settings)


def columns(steps):
    micros = [micro for step in steps for micro in step.micro_batches]
    return tuple(torch.cat([getattr(m, name) for m in micros]) for name in ("sample_ids", "input_ids", "labels"))


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (2, 3), (3, 4)])
def test_a_global_batch_does_not_depend_on_its_split(tmp_path, world_size, micro_batch_size):
    corpus = make(tmp_path)
    end = Position(0, 0, len(corpus.rows(0)) - 5)  # the first batch runs over the epoch's end
    whole = list(itertools.islice(make_batches(corpus, position=end), 3))
    split = {"world_size": world_size, "micro_batch_size": micro_batch_size, "position": end, "steps": 3}
    ranks = [list(make_batches(corpus, rank=r, **split)) for r in range(world_size)]
    for step in range(3):
        of_ranks = [each[step] for each in ranks]
        assert all(map(torch.equal, columns(of_ranks), columns([whole[step]])))
        assert sum(each.rows for each in of_ranks) == whole[step].rows == (columns(of_ranks)[2] != IGNORE_INDEX).sum()


def test_resuming_anywhere_equals_going_on(tmp_path):
    corpus = make(tmp_path, count=60)
    steps = list(itertools.islice(make_batches(corpus), 16))
    assert steps[-1].position.epoch >= 1
    for before, after in itertools.pairwise(steps):
        resumed = next(make_batches(corpus, position=Position(*json.loads(json.dumps(before.position)))))
        assert all(map(torch.equal, columns([resumed]), columns([after]))) and resumed.position == after.position


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (3, 1), (50, 4)])
def test_validation_shares_are_disjoint_and_complete(tmp_path, world_size, micro_batch_size):
    corpus = make(tmp_path)
    shares = [
        list(causal.validation_batches(corpus, micro_batch_size=micro_batch_size, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({tuple(m.input_ids.shape for m in share) for share in shares}) == 1
    everything = causal.batch(corpus.validation["id"], corpus.validation["marks"])
    found = {}
    for micro in itertools.chain(*shares):
        for number, labels in zip(micro.sample_ids.tolist(), micro.labels, strict=True):
            if (labels != IGNORE_INDEX).any():
                assert number not in found
                found[number] = labels
    assert sorted(found) == list(range(len(corpus.validation)))
    assert all(torch.equal(everything.labels[number], labels) for number, labels in found.items())


def test_causal_c4_from_end_to_end(tmp_path, hub, monkeypatch):  # noqa: F811
    tokenizer = make(tmp_path).tokenizer
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    hub(c4.VALIDATION_FILE, make_texts(50, seed=100))
    flags = CausalTextFlags(data="c4", tokenizer=str(tmp_path / "tokenizer"), seq_len=T)
    corpus = causal.build(flags)
    hub(c4.train_file(7), make_texts(20, seed=7))
    packer = packing.CausalPacker.of(tokenizer, T)
    packer.write(tmp_path / "expected", make_texts(20, seed=7))
    assert (corpus.rows(7) == packer.open(tmp_path / "expected")).all()
    wait_for_workers()
    assert corpus.fingerprint == causal.build(flags).fingerprint


# ---------------------------------------------------------------------------------------------------------- tokenizers

TRAIN = """
import hashlib, json, sys
from kd_core.text.causal_tokenizer import train_byte_bpe
print(hashlib.sha256(train_byte_bpe(json.load(open(sys.argv[1])), 700).to_str().encode()).hexdigest())
"""


def test_training_gives_the_same_tokenizer_in_every_process(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(make_texts(1500) + ["caf\u00e9 \u4e2d\u6587 " * 3]))
    runs = [
        run_python(TRAIN, tmp_path / "texts.json", PYTHONHASHSEED=seed, RAYON_NUM_THREADS=threads)
        for seed, threads in (("0", "1"), ("7", "2"), ("99", "4"))
    ]
    assert len({finish(run) for run in runs}) == 1
