"""Causal language models: logits at given positions, the leak that a cache opens, evaluation, sizes."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kd_core.kernels import linear_softmax_kl
from kd_core.losses import linear
from kd_core.losses.linear import LossHead
from kd_core.text import causal, causal_lm, varlen
from kd_core.text.causal_lm import CausalLM
from kd_core.text.packing import BEGINS, LABEL, PADDING
from kd_core.text.probes import require_head, require_isolation
from tests.conftest import Largest

VOCABULARY = 128
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=64, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {"head_dim": 16}, "gemma3_text": {"head_dim": 16}, "gpt2": {}, "gpt_neox": {}, "phi3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16}, "granite": {"logits_scaling": 4.0}, "cohere": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 0.5}, "falcon_h1": {"lm_head_multiplier": 0.5},
}  # fmt: skip
LEAKING = ("opt", "falcon_h1")  # learned positions that follow from a mask; a state-space model's state


def model(kind: str = "llama", **settings: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | KINDS[kind] | settings))
    ).eval()


def packed(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of random documents: tokens and restarting positions, [1, T] each."""
    input_ids = torch.randint(VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    return input_ids, torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "falcon_h1"])
def test_logits_at_positions_are_the_models_own(kind: str) -> None:
    lm = model(kind)
    require_head(lm, "--student x")
    input_ids, position_ids = packed(24)
    full = lm.lm(input_ids, position_ids=position_ids, use_cache=False).logits[0]
    positions = torch.tensor([0, 3, 23])
    torch.testing.assert_close(lm(input_ids, position_ids, None, positions), full[positions])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_are_alone_or_the_model_is_refused(kind: str) -> None:
    if kind in LEAKING:
        with pytest.raises(
            ValueError, match=rf"--teachers t \({type(model(kind).lm).__name__}\) lets a document see .* --no-packing"
        ):
            require_isolation(model(kind), "--teachers t")
        return
    lm = model(kind)
    require_isolation(lm, "--teachers t")
    input_ids, position_ids = packed(9, 1, 14)
    whole = lm(input_ids, position_ids, None, torch.arange(24))
    for start, end in ((0, 9), (9, 10), (10, 24)):
        alone = lm(input_ids[:, start:end], position_ids[:, start:end], None, torch.arange(end - start))
        torch.testing.assert_close(whole[start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*LEAKING, "gemma2")])
def test_attention_within_documents_is_that_with_a_mask(kind: str) -> None:
    """In rows of several documents and of one, with a sliding window shorter than some."""
    lm = model(kind, **{"sliding_window": 5} if kind == "gemma3_text" else {})
    (long, once), (ids, restarted) = packed(24), packed(9, 1, 14)
    inputs = torch.cat([ids, long]), torch.cat([restarted, once]), None, torch.arange(48)
    masked = lm(*inputs)
    gradients = torch.autograd.grad(masked.square().sum(), list(lm.parameters()))
    varlen.give(lm.lm, "--student s")
    require_isolation(lm, "--student s")
    within = lm(*inputs)
    torch.testing.assert_close(within, masked)
    of_within = torch.autograd.grad(within.square().sum(), list(lm.parameters()))
    torch.testing.assert_close(of_within, gradients, rtol=1e-4, atol=1e-4)


def test_attention_within_documents_refuses_what_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, lacks in (("gemma2", "soft cap"), ("gpt2", "dropout")):
        lm = model(kind).train()
        varlen.give(lm.lm, "--student s")
        with pytest.raises(
            ValueError, match=f"--attention varlen has no {lacks} of attention, which G.*Attention asks for; leave"
        ):
            lm(*packed(8), None, torch.arange(8))
    monkeypatch.setattr(type(lm.lm), "_can_set_attn_implementation", lambda _: False)
    with pytest.raises(ValueError, match=r"--student s \(GPT2LMHeadModel\) has an attention of its own"):
        varlen.give(model("gpt2").lm, "--student s")


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_teacher_in_8_bits_keeps_its_head(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model(kind).lm.save_pretrained(tmp_path)
    cfg = {"seq_len": 24, "packing": True, "attention": "sdpa"}
    bf16, int8 = (
        causal_lm.load_teacher(SimpleNamespace(teacher_dtype=dtype, **cfg), VOCABULARY, str(tmp_path)).eval()
        for dtype in ("bf16", "int8")
    )
    assert type(int8.head.weight) is torch.nn.Parameter and torch.equal(int8.head.weight, bf16.head.weight)
    ours, theirs = (one(*packed(9, 15), None, torch.arange(24)).float() for one in (int8, bf16))
    assert 0 < (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [-1, 4])
def test_attention_within_documents_by_the_kernel(window: int) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    shape = dict(generator=draw, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    query, key, value = (torch.randn(2, heads, 300, 64, **shape) for heads in (4, 2, 2))
    positions = torch.cat([torch.arange(length) for length in (300, 7, 1, 292)]).view(2, 300).cuda()
    settings = {"scaling": 0.2, "sliding_window": None if window < 0 else window + 1, **varlen.documents(positions)}
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [each.detach().to(dtype).requires_grad_() for each in (query, key, value)]
        out, _ = varlen.attention(None, *inputs, None, **settings)
        made.append([out.float(), *(g.float() for g in torch.autograd.grad(out.float().square().sum(), inputs))])
    for ours, exact in zip(*made, strict=True):
        assert (ours - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("opened", ["cache", "mask", "positions"])
def test_the_probe_finds_the_leak(kind: str, opened: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a careless call has: transformers' cache, a mask of ones, positions that run on."""
    lm = model(kind)
    of_model = type(lm.lm.base_model).forward

    def careless(self: Any, input_ids: torch.Tensor, position_ids: Any = None, **settings: Any) -> Any:
        settings["use_cache"] = opened == "cache"
        if opened == "mask":
            settings["attention_mask"] = torch.ones_like(input_ids)
        if opened == "positions":
            position_ids = torch.arange(input_ids.shape[1])[None]
        return of_model(self, input_ids, position_ids=position_ids, **settings)

    monkeypatch.setattr(type(lm.lm.base_model), "forward", careless)
    with pytest.raises(ValueError, match="lets a document see the one before it"):
        require_isolation(lm, "--student s")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_a_deep_model_is_no_leak(dtype: torch.dtype) -> None:
    require_isolation(model("llama", num_hidden_layers=32).to(dtype), "--teachers t")


def test_logits_that_the_config_does_not_tell_are_refused() -> None:
    lm = model("granite")
    lm.logit_scale = 1.0
    with pytest.raises(
        ValueError, match=r"--teachers t \(GraniteForCausalLM\) makes its logits in a way that is not known here"
    ):
        require_head(lm, "--teachers t")


def test_a_model_without_positions_is_refused() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"--student b \(BloomForCausalLM\) takes no position_ids"):
        require_head(CausalLM(AutoModelForCausalLM.from_config(config)), "--student b")


@pytest.mark.parametrize(
    ("name", "billions"), [("135M", 0.1345), ("360M", 0.3618), ("1B", 1.2358), ("3B", 3.2127), ("8B", 8.0303)]
)
def test_sizes_are_the_published_ones(name: str, billions: float) -> None:
    vocab_size = 49152 if name.endswith("M") else 128256
    size = causal_lm.size_of(name)
    assert size is not None
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=vocab_size, **size))
    assert sum(parameter.numel() for parameter in lm.parameters()) == pytest.approx(billions * 1e9, rel=1e-3)
    assert lm.config.rope_parameters["rope_theta"] == size["rope_theta"]


def test_a_size_of_layers_and_width() -> None:
    size = causal_lm.size_of("3x192")
    assert size and (size["num_hidden_layers"], size["hidden_size"], size["num_attention_heads"]) == (3, 192, 3)
    assert causal_lm.size_of("owner/3x192") is causal_lm.size_of("runs/1") is None


# What must not change what a step learns.

VALID = VOCABULARY - 9
LENGTHS = (10, 6, 8, 24, 3, 13, 8)  # of documents, which fill three rows of 24


@pytest.fixture(scope="module")
def pair() -> tuple[CausalLM, CausalLM]:
    """A student whose head gives losses, and a wider teacher of another vocabulary size."""
    student, teacher = model(tie_word_embeddings=True), model("granite", hidden_size=48, vocab_size=VOCABULARY + 5)
    student.head.__class__ = LossHead
    return student, teacher.requires_grad_(False)


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and marks; some tokens are a prompt's, so that rows have unequal numbers of labels, the third none."""
    draw = np.random.default_rng(0)
    made = []
    for number, length in enumerate(LENGTHS):
        marks = np.where(draw.random(length) < (0 if number in (3,) else 0.6), LABEL, 0).astype(np.uint8)
        marks[0] = BEGINS
        made.append((draw.integers(VALID, size=length), marks))
    return made


def rows(packing: bool) -> tuple[np.ndarray, np.ndarray]:
    """The documents in three full rows, or one a row and padded."""
    if packing:
        ids, marks = (np.concatenate(parts).reshape(3, 24) for parts in zip(*documents(), strict=True))
        return ids, marks
    ids, marks = np.zeros((len(LENGTHS), 24), np.int64), np.full((len(LENGTHS), 24), PADDING, np.uint8)
    for row, (own_ids, own_marks) in enumerate(documents()):
        ids[row, : len(own_ids)], marks[row, : len(own_ids)] = own_ids, own_marks
    return ids, marks


def step(student: CausalLM, teacher: CausalLM, micro: int, packing: bool, divergence: str) -> dict[str, torch.Tensor]:
    """The loss of a step and its gradient by parameter, from micro-batches of so many rows: sums, divided once."""
    student.zero_grad()
    ids, marks = rows(packing)
    batches = [causal.batch(ids[i : i + micro], marks[i : i + micro]) for i in range(0, len(ids), micro)]
    tokens, loss = sum(len(one.positions) for one in batches), torch.zeros(())
    for one in batches:
        loss_sum, *_ = student(
            *one.inputs, causal_lm.head_and_input(teacher, one), one.targets, divergence=divergence, kd_weight=0.7,
            label_weight=0.3, temperature=2.0, valid_columns=VALID,
        )  # fmt: skip
        (loss_sum / tokens).backward()
        loss += loss_sum.detach() / tokens
    return {"loss": loss} | {name: parameter.grad.clone() for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize(("micro", "packing"), [(1, True), (2, True), (1, False), (3, False), (7, False)])
def test_packing_padding_and_micro_batches_change_nothing(
    pair: tuple[CausalLM, CausalLM], micro: int, packing: bool, divergence: str
) -> None:
    whole, other = (step(*pair, size, packed_rows, divergence) for size, packed_rows in ((3, True), (micro, packing)))
    assert whole["loss"] > 0 and len(whole) > 15
    torch.testing.assert_close(other, whole, rtol=2e-4, atol=1e-6)


def test_a_padded_vocabulary_changes_nothing(pair: tuple[CausalLM, CausalLM]) -> None:
    student, teacher = pair
    padded = copy.deepcopy(student)
    padded.lm.resize_token_embeddings(VOCABULARY + 64, mean_resizing=False)
    padded.head.weight.data[VALID:] = 50.0
    padded.head.__class__ = LossHead
    wide, narrow = step(padded, teacher, 1, True, "forward_kl"), step(student, teacher, 1, True, "forward_kl")
    for name, gradient in narrow.items():
        if "embed" in name or "head" in name:
            assert not wide[name][VALID:].any()
            torch.testing.assert_close(wide[name][:VALID], gradient[:VALID])
        else:
            torch.testing.assert_close(wide[name], gradient)


def test_what_is_measured_beside_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that is the student: no divergence, all agreement; bits per byte of a uniform model follow from its columns."""
    monkeypatch.setattr(causal_lm, "token_bytes", lambda _: np.full(VOCABULARY, 2))
    monkeypatch.setattr(causal_lm, "total", lambda value: torch.as_tensor(value, dtype=torch.float64))  # of one rank
    lm = model()
    ids, marks = rows(packing=True)
    batches = [
        causal.batch(ids, marks),
        causal.batch(ids[:1], np.full((1, 24), BEGINS, np.uint8)),
    ]  # the second has no label
    scores = causal_lm.evaluate(lm, None, batches, columns=VALID, teachers=[lm])
    assert scores["eval/kl"] == 0 and scores["eval/agreement"] == 1 and scores["eval/acceptance"] == 1
    assert scores["eval/perplexity"] == pytest.approx(math.exp(scores["eval/loss"]))
    lm.head.weight.data.zero_()
    scores = causal_lm.evaluate(lm, None, batches[:1], columns=VALID)
    assert scores["eval/loss"] == pytest.approx(math.log(VALID))
    assert scores["eval/bits_per_byte"] == pytest.approx(math.log2(VALID) / 2)  # two bytes a token
    assert "eval/kl" not in scores


def test_a_step_and_an_evaluation_of_8192_tokens_hold_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of student or teacher: the largest tensor that is made within has fewer elements than a quarter of them."""
    monkeypatch.setattr(causal_lm, "token_bytes", lambda _: np.ones(512))
    monkeypatch.setattr(causal_lm, "total", lambda value: torch.as_tensor(value, dtype=torch.float64))
    for module in (linear, linear_softmax_kl):
        monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 4 << 20)
    student, teacher = model(vocab_size=512, num_hidden_layers=1), model(vocab_size=512, num_hidden_layers=1)
    student.head.__class__ = LossHead
    ids, marks = np.random.default_rng(0).integers(512, size=(128, 64)), np.full((128, 64), LABEL, np.uint8)
    one = causal.batch(ids, marks)
    with Largest() as largest:
        side = causal_lm.head_and_input(teacher.requires_grad_(False), one)
        loss, *_ = student(
            *one.inputs, side, one.targets, divergence="forward_kl", kd_weight=0.9, label_weight=0.1, temperature=1.0
        )
        loss.backward()
        causal_lm.evaluate(student, None, [one], columns=512, teachers=[teacher])
    assert largest.elements < len(one.positions) * 512 / 4
    with Largest() as largest:
        student(*one.inputs)
    assert largest.elements >= len(one.positions) * 512
