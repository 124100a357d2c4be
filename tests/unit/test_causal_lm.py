"""Causal language models: logits at given positions, the leak that a cache opens, evaluation, sizes."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kd_core.text import causal_lm
from kd_core.text.causal_lm import CausalLM
from kd_core.text.probes import require_head, require_isolation

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
