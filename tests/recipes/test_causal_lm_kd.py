"""The recipe of causal language models: what it trains is the loss, whatever computes it; its export; what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.text import causal
from kd_core.text.corpus import IGNORE_INDEX
from kd_core.text.flags import CausalTextFlags
from recipes.causal_lm_kd import main
from tests.conftest import ROOT, deepspeed
from tests.recipes.conftest import Attempt, metrics
from tests.recipes.test_every_recipe import lines, result, run

RECIPE = ROOT / "recipes" / "causal_lm_kd.py"
SMALL = (
    "--student 1x64 --vocab-size 512 --seq-len 32 --steps 4 --global-batch-size 8 --micro-batch-size 4 "
    "--deepspeed-config zero0_fp32_cpu.json --log-every 1 --eval-every 2"
).split()
NAMES = ("loss", "label_loss", "kd_loss", "grad_norm", "supervised_tokens")


@pytest.fixture
def words(corpus_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("KD_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return [*SMALL, "--data", str(corpus_file)]


def train(words: list[str], folder: Path, out: str, *flags: object, ranks: int = 1) -> Path:
    run([sys.executable, str(RECIPE), *words, *map(str, flags), "--out", out], ranks, folder)
    return folder / out


@pytest.fixture(scope="module")
def taught(corpus_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `teacher` and `run`, which it taught to the end."""
    folder = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_CACHE", str(cache))
        words = [*SMALL, "--data", str(corpus_file)]
        train(words, folder, "teacher", "--student", "2x64")
        train(words, folder, "run", "--teachers", "teacher", "--teacher-dtype", "fp32", "--kd-ratio", 0.9)
    return folder


def values(folder: Path) -> list[float]:
    return [line[name] for line in metrics(folder) for name in NAMES]


def test_the_log_is_the_loss_and_says_how_near_the_teacher_is(taught: Path) -> None:
    for line in metrics(taught / "run"):
        assert line["loss"] == pytest.approx(0.1 * line["label_loss"] + 0.9 * line["kd_loss"])
        assert line["tokens"] == 32 * line["samples"] and line["supervised_tokens"] < 8 * 32
    evaluated = [line for line in metrics(taught / "run") if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    for line in evaluated:
        assert line["eval/kl"] > 0 and 0 < line["eval/agreement"] <= 1 and 0 < line["eval/acceptance"] < 1
    assert "eval/kl" not in metrics(taught / "teacher")[-1]


def test_the_export_has_the_same_loss_and_writes_text(taught: Path, words: list[str], corpus_file: Path) -> None:
    folder = taught / "run" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    corpus = causal.build(CausalTextFlags(data=str(corpus_file), vocab_size=512, seq_len=32))
    assert model.config.vocab_size == len(corpus.tokenizer) == len(AutoTokenizer.from_pretrained(folder))
    assert model.generation_config.eos_token_id == corpus.tokenizer.eos_token_id
    loss_sum, tokens, text_bytes = 0.0, 0, 0
    with torch.no_grad():
        for batch in causal.validation_batches(corpus, micro_batch_size=16, rank=0, world_size=1):
            logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
            loss_sum += float(softmax_kl(logits.flatten(0, 1), None, batch.labels.flatten())[1].double().sum())
            tokens += int((batch.labels != IGNORE_INDEX).sum())
            text_bytes += sum(len(corpus.tokenizer.decode([token]).encode()) for token in batch.targets if token >= 2)
    last = metrics(taught / "run")[-1]
    assert loss_sum / tokens == pytest.approx(last["eval/loss"], rel=1e-5)
    assert last["eval/bits_per_byte"] == pytest.approx(loss_sum / 0.6931472 / text_bytes, rel=1e-5)
    (said,) = pipeline("text-generation", model=str(folder))("Ba", max_new_tokens=3, do_sample=False)
    assert said["generated_text"].startswith("Ba")


@pytest.mark.parametrize("divergence", ["forward_kl", pytest.param("jensen_shannon", marks=pytest.mark.slow)])
def test_losses_in_chunks_and_attention_within_documents_change_nothing(
    divergence: str, taught: Path, words: list[str], tmp_path: Path
) -> None:
    flags = ["--teachers", taught / "teacher", "--teacher-dtype", "fp32", "--kd-ratio", 0.9, "--divergence", divergence]
    whole = taught / "run" if divergence == "forward_kl" else train(words, tmp_path, "whole", *flags)
    chunks = train(
        words, tmp_path, "chunks", *flags, "--logits-mib", 0, "--gradient-checkpointing", "--attention", "varlen"
    )
    assert values(chunks) == pytest.approx(values(whole), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro", "ranks", "stage"), [(8, 1, 0), (2, 1, 0), (2, 2, 0), (1, 2, 1), (2, 2, 2), (2, 2, 3)]
)
def test_micro_batches_ranks_and_stages_change_nothing(
    micro: int, ranks: int, stage: int, taught: Path, words: list[str], tmp_path: Path
) -> None:
    """Rows have unequal numbers of supervised tokens, as documents begin where they like."""
    config = tmp_path / "stage.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    flags = ["--teachers", taught / "teacher", "--teacher-dtype", "fp32", "--kd-ratio", 0.9, "--logits-mib", 0]
    flags += ["--micro-batch-size", micro, "--deepspeed-config", config]
    other = train(words, tmp_path, "run", *flags, ranks=ranks)
    assert values(other) == pytest.approx(values(taught / "run"), rel=1e-3)
    for ours, theirs in zip(metrics(other), metrics(taught / "run"), strict=True):
        assert {k: v for k, v in ours.items() if k.startswith("eval/")} == pytest.approx(
            {k: v for k, v in theirs.items() if k.startswith("eval/")}, rel=1e-3
        )


@pytest.mark.parametrize(("stop", "step"), [(0.5, 2), pytest.param(1.0, 4, marks=pytest.mark.slow)])
def test_an_evaluation_that_is_made_up_for_where_the_window_closes_asks_the_teachers(
    stop: float, step: int, taught: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP_IN", str(1 + step // 2))
    (tmp_path / "teacher").symlink_to(taught / "teacher")
    flags = ["--teachers", "teacher", "--teacher-dtype", "fp32", "--kd-ratio", 0.9, "--kd-stop", stop]
    script = str(ROOT / "tests" / "recipes" / "toys" / "stopped_evaluation.py")
    run([sys.executable, script, *words, *map(str, flags), "--out", "run"], 1, tmp_path)
    assert result(tmp_path / "run")["step"] == step
    assert "eval/loss" not in lines(tmp_path / "run")[step - 1]
    train([], tmp_path, "run", "--resume")
    assert lines(tmp_path / "run")[:step] == lines(taught / "run")[:step]


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(taught: Path, words: list[str], tmp_path: Path) -> None:
    """Documents are kept apart there too, and steps with other numbers of supervised tokens are none of another model."""
    flags = ["--teachers", taught / "teacher", "--teacher-dtype", "fp32", "--kd-ratio", 0.9, "--logits-mib", 0]
    assert values(train(words, tmp_path, "run", *flags, "--compile")) == pytest.approx(values(taught / "run"), rel=1e-3)


def checkpoint(folder: Path, tokenizer: Any, kind: str, **shape: Any) -> Path:
    """A tiny random model of a kind, with the tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer) + 3, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, **shape,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(taught: Path) -> Any:
    return AutoTokenizer.from_pretrained(taught / "run" / "hf")


def test_checkpoints_of_other_kinds_teach_and_learn(
    taught: Path, tokenizer: Any, words: list[str], tmp_path: Path
) -> None:
    """A GPT-2 learns from a Gemma with a soft cap and from a Llama, as an ensemble, with rows padded in the vocabulary."""
    teacher = checkpoint(tmp_path / "gemma", tokenizer, "gemma2", head_dim=16, final_logit_softcapping=5.0)
    student = checkpoint(tmp_path / "gpt2", tokenizer, "gpt2")
    flags = ["--student", student, "--teachers", teacher, taught / "teacher", "--sampler", "all", "--kd-ratio", 0.5]
    folder = train(words, tmp_path, "run", *flags, "--steps", 2)
    assert metrics(folder)[-1]["kd_loss"] > 0
    exported = AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert type(exported).__name__ == "GPT2LMHeadModel" and exported.config.vocab_size == len(tokenizer)


@pytest.fixture
def attempt(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Attempt:
    monkeypatch.chdir(tmp_path)
    return Attempt(main, words, tmp_path, capsys)


def test_bad_flags(attempt: Attempt) -> None:
    assert "--beta must be in (0, 1); at its ends the divergence is 0 or a KL, got 1.0" in attempt("--beta", 1)
    assert "--beta must be in (0, 1)" in attempt("--beta", 0)
    assert "--student must be LAYERSxWIDTH with a width that 64 divides" in attempt("--student", "2x100")
    assert "--logits-mib must be a finite number, at least 0, got -1.0" in attempt("--logits-mib", -1)
    assert "--weight-decay must be in [0, 1), got 1.0" in attempt("--weight-decay", 1)
    assert "--teachers must be models; this recipe reads no caches" in attempt("--teachers", "cache:x", "--kd-ratio", 1)
    assert "device or sharded for teachers in int8" in attempt(
        "--teacher-dtype", "int8", "--teacher-placement", "zero3"
    )
    assert '--teacher-dtype must be bf16 or fp32 with ZeRO stage 3, unless zero_optimization has "memory_ef' in attempt(
        "--teacher-dtype", "int8", "--deepspeed-config", "zero3_bf16.json"
    )
    assert "--teachers nowhere/x/y" in attempt("--teachers", "nowhere/x/y", "--kd-ratio", 1)


def test_models_that_do_not_fit(attempt: Attempt, taught: Path, tokenizer: Any, tmp_path: Path) -> None:
    kd = ("--kd-ratio", 0.9, "--teachers")
    many = attempt(*kd, taught / "teacher", taught / "run", "--sampler", "all", "--logits-mib", 0.01)
    assert "--logits-mib 0.01: ensembles" in many and "lower --micro-batch-size" in many
    opt = checkpoint(tmp_path / "opt", tokenizer, "opt", ffn_dim=64, word_embed_proj_dim=32)
    refused = f"{opt} (OPTForCausalLM) lets a document see the one before it in a packed row"
    assert f"--teachers {refused}" in (said := attempt(*kd, opt)) and "give --no-packing, or another model" in said
    assert f"--student {refused}" in attempt("--student", opt)
    short = checkpoint(tmp_path / "short", tokenizer, "gpt2")
    assert "fewer than --seq-len 128" in attempt(*kd, short, "--seq-len", 128)
    assert "varlen has no dropout of attention" in attempt("--student", short, "--attention", "varlen")
    other = tmp_path / "other"
    checkpoint(other, tokenizer, "gpt2")
    fields = json.loads((other / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["the"], vocabulary["a"] = vocabulary.get("a", 67), vocabulary.get("the", 400)
    (other / "tokenizer.json").write_text(json.dumps(fields))
    assert f"--teachers {other} has another vocabulary than the run" in attempt(*kd, other)


def test_a_model_that_leaks_when_packed_is_taken_padded(tokenizer: Any, words: list[str], tmp_path: Path) -> None:
    opt = checkpoint(tmp_path / "opt", tokenizer, "opt", ffn_dim=64, word_embed_proj_dim=32)
    flags = ["--no-packing", "--on-too-long", "cut", "--teachers", opt, "--kd-ratio", 0.5, "--steps", 2]
    assert metrics(train(words, tmp_path, "run", *flags))[-1]["kd_loss"] > 0


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_dialogues_train_their_answers_and_the_export_has_the_template(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    turns = [("user", "Say {}."), ("assistant", "It is {}."), ("user", "And then?"), ("assistant", "Then {}.")]
    records = [
        {"messages": [{"role": role, "content": said.format(number)} for role, said in turns]} for number in range(300)
    ]
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, records)))
    flags = ["--preset", "responses", *words, "--data", "said.jsonl", "--chat-template", "chat.jinja"]
    folder = train(flags, tmp_path, "run", "--seq-len", 128, "--vocab-size", 300, "--steps", 2)
    last = metrics(folder)[-1]
    assert 0 < last["supervised_tokens"] < 8 * 128 / 2, "prompts are supervised"
    assert AutoTokenizer.from_pretrained(folder / "hf").chat_template == TEMPLATE
    asked = [{"role": "user", "content": "Say 3."}]
    (answer,) = pipeline("text-generation", model=str(folder / "hf"))(asked, max_new_tokens=2, do_sample=False)
    assert answer["generated_text"][-1]["role"] == "assistant"


@pytest.mark.slow
def test_where_weights_lie_and_in_how_many_bits_changes_little(taught: Path, words: list[str], tmp_path: Path) -> None:
    """On two ranks: ZeRO-3 with its weights and optimizer in CPU memory, a teacher split by ZeRO-3, one in 8 bits."""
    flags = ["--teachers", taught / "teacher", "--kd-ratio", 0.9, "--deepspeed-config"]
    plain = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "memory_efficient_linear": False}}
    (tmp_path / "plain_linear.json").write_text(json.dumps(plain))
    one = train(words, tmp_path, "one", *flags, "zero1_bf16.json", ranks=2)
    for name, *changed in (
        ("offload", "zero3_bf16_offload.json"),
        ("chunks", "zero3_bf16_offload.json", "--logits-mib", 0, "--gradient-checkpointing"),
        ("split", "zero3_bf16.json", "--teacher-placement", "zero3"),
        ("int8", tmp_path / "plain_linear.json", "--teacher-dtype", "int8", "--logits-mib", 0),
    ):
        assert values(train(words, tmp_path, name, *flags, *changed, ranks=2)) == pytest.approx(values(one), rel=0.01)


@pytest.mark.slow
def test_steps_without_a_label_leave_the_weights_alone_on_any_number_of_ranks(words: list[str], tmp_path: Path) -> None:
    """Of two rows a step, each a dialogue of which most have no answer: on two ranks, one is often without a label, or both."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    answer = {"role": "assistant", "content": "It is said."}
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        records = [
            {"messages": [{"role": "user", "content": f"{split} {n}"}, *[answer] * (n % 3 == 0)]} for n in range(40)
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    flags = ["--data", "data", "--chat-template", "chat.jinja", "--no-packing", "--tokenizer", "bytes", "--seq-len", 64]
    flags += ["--global-batch-size", 2, "--micro-batch-size", 1, "--steps", 6, "--eval-every", 1]
    one, two = (metrics(train([*words, *map(str, flags)], tmp_path, f"of{ranks}", ranks=ranks)) for ranks in (1, 2))
    empty = [index for index, line in enumerate(one) if not line["supervised_tokens"]]
    assert len({line["supervised_tokens"] for line in one}) == 3, "no step in which one of two ranks has no label"
    for index in empty:
        assert one[index]["loss"] == one[index]["lr"] == one[index]["grad_norm"] == 0
        assert not index or one[index]["eval/loss"] == one[index - 1]["eval/loss"]
    assert [line["eval/loss"] for line in two] == pytest.approx([line["eval/loss"] for line in one], rel=1e-4)
    assert [line["supervised_tokens"] for line in two] == [line["supervised_tokens"] for line in one]


@pytest.mark.slow
def test_two_ranks_under_the_launcher_with_zero_3_in_bf16(words: list[str], taught: Path, tmp_path: Path) -> None:
    flags = ["--teachers", str(taught / "teacher"), "--kd-ratio", "0.9", "--deepspeed-config", "zero3_bf16.json"]
    done = deepspeed(2, str(RECIPE), *words, *flags, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").dtype == torch.bfloat16
