"""Teachers made of counts: what they answer, by hand and by their losses, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd_core.losses.distillation import distillation_sum
from kd_core.text import counts
from kd_core.text.corpus import Corpus, prepare
from kd_core.text.masking import validation_batches

ROWS = np.array([[0, 4, 5, 4, 1], [0, 5, 4, 5, 1]])  # 0 to 3 are special, 4 to 6 are not


class Tokenizer(SimpleNamespace):
    mask_token_id = 3
    all_special_ids: ClassVar = [0, 1, 2, 3]

    def __len__(self) -> int:
        return 7

    def __hash__(self) -> int:
        return id(self)

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(7)}


def toy(**entries: Any) -> Any:
    return SimpleNamespace(
        **{"tokenizer": Tokenizer(), "num_shards": 1, "name": "toy", "rows": lambda _: ROWS} | entries
    )


def shares(name: str, left: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setattr(counts, "ROWS_AT_ONCE", 1)
    model = counts.teacher(name, toy())
    return list(model(torch.tensor([[0, 0], [left, 3]]), torch.tensor([3])).softmax(-1)[0].tolist())


def test_shares_are_those_of_the_rows_smoothed_by_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    third = 1 / 3
    alike = [0, 0, 0, 0, third, third, third]
    assert shares("uniform", 4, monkeypatch) == pytest.approx(alike)
    unigram = [0, 0, 0, 0, (3 + third) / 7, (3 + third) / 7, third / 7]
    assert shares("unigram", 4, monkeypatch) == pytest.approx(unigram)
    # 4 is followed by 5 twice, and by 1, which has no place in a text; what is masked tells nothing.
    assert shares("bigram", 4, monkeypatch) == pytest.approx(
        [0, 0, 0, 0, unigram[4] / 3, (2 + unigram[5]) / 3, unigram[6] / 3]
    )
    assert shares("bigram", 3, monkeypatch) == pytest.approx(unigram)


def test_a_uniform_teacher_is_label_smoothing() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7, requires_grad=True), torch.randint(7, (5,))
    alike = torch.zeros(5, 7)
    mixed, _, _ = distillation_sum(
        logits, alike, labels, divergence="forward_kl", kd_weight=0.1, label_weight=0.9, temperature=1.0
    )
    smoothed = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    ours, theirs = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (mixed, smoothed))
    torch.testing.assert_close(ours, theirs)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Words that are each followed by one of two."""
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    words = [f"{a}{b}o" for a in "bcdfg" for b in "aeiou"]
    texts = []
    for _ in range(200):
        at = [0]
        for _ in range(40):
            at.append((2 * at[-1] + int(draw.integers(2))) % len(words))
        texts.append(" ".join(words[i] for i in at))
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    return prepare(str(tmp_path / "texts.txt"), tokenizer=None, vocab_size=60, seq_len=16)


def test_the_more_is_counted_the_lower_the_loss(corpus: Corpus) -> None:
    losses = []
    for name in counts.NAMES:
        counts.check(name, corpus)
        model = counts.teacher(name, corpus)
        batches = validation_batches(corpus, micro_batch_size=32, rank=0, world_size=1)
        losses.append(float(np.mean([F.cross_entropy(model(*batch.inputs), batch.labels) for batch in batches])))
    uniform, unigram, bigram = losses
    assert bigram < unigram - 0.3 and unigram < uniform


@pytest.mark.parametrize(
    ("name", "entries", "told"),
    [
        ("trigram", {}, "counts:trigram is not known; name one of counts:uniform, counts:unigram, counts:bigram"),
        ("unigram", {"num_shards": 9}, "toy is too large for that"),
        ("bigram", {"tokenizer": range(5000)}, "a vocabulary of at most 4096 tokens, got 5000"),
    ],
)
def test_what_cannot_be_counted_is_refused(name: str, entries: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        counts.check(name, toy(**entries))
