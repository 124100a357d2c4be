"""BERT masked-language-model pretraining with a distillation window at its start.

Method:  loss = (1 - r) * label_loss + r * kd_loss, r = kd_ratio inside the window, 0 outside;
         kd_loss = tau^2 * KL(teacher || student) at masked positions, one teacher of the pool drawn per step
Source:  Blakeney et al. 2022, "Reduce, Reuse, Recycle", arXiv 2211.00683; defaults: the authors' released code
Command: deepspeed recipes/bert_kd.py --data c4 --teachers google-bert/bert-large-uncased --kd-ratio 0.9 --kd-stop 0.35
Smoke:   python recipes/bert_kd.py --student tiny --vocab-size 1024 --seq-len 32 --steps 4 --global-batch-size 8 --micro-batch-size 4 --deepspeed-config zero0_fp32_cpu.json
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM
from transformers.utils.logging import disable_progress_bar

from kd_core import cli, engine, report, schedule, teachers, text
from kd_core.kernels.softmax_kl import softmax_kl, softmax_kl_sum
from kd_core.samplers import draw_teachers

RECIPE = Path(__file__).stem
disable_progress_bar()  # Hugging Face's, for files that load in a moment
# Layers and width of Turc et al. 2019 (arXiv 1908.08962) and Devlin et al. 2018; heads of 64, feed-forward 4 x width.
SIZES = dict(tiny=(2, 128), mini=(4, 256), small=(4, 512), medium=(8, 512), base=(12, 768), large=(24, 1024))


@dataclass(frozen=True)
class Config(cli.SharedFlags):
    """BERT pretraining with a distillation window. `--load RUN_JSON` starts from a saved run's flags."""

    student: str = "base"
    """tiny, mini, small, medium, base or large (random initialisation), or a BERT checkpoint to start from."""
    tokenizer: str | None = None
    """Hub name, folder, tokenizer.json or SentencePiece .model; default: WordPiece trained on the data (c4: BERT's)."""
    vocab_size: int = 8192
    """Size of the WordPiece vocabulary when it is trained on the data."""
    data: str = "embedded"
    """c4, a hub name, a file or folder of txt/jsonl/json/parquet (.gz, .xz), or embedded (Python's documentation)."""
    seq_len: int = 128
    """Tokens per sample."""
    mask_fraction: float = 0.15
    """Share of the positions masked in training (MosaicBERT: 0.30); evaluation always masks 0.15."""
    teacher_dtype: Literal["bf16", "fp32"] = "bf16"
    """Weights and activations of the teachers."""
    weight_decay: float = 1e-5
    """Decoupled: the share of a weight that is lost per step at the peak learning rate."""
    dropout: float = 0.1
    """On hidden states and attention."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    # The authors' released settings for BERT-base on C4.
    steps: int = 70_000
    global_batch_size: int = 4096
    micro_batch_size: int = 128
    save_every: int = 3500
    eval_every: int = 3500

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("seq_len", 8 <= self.seq_len <= 512, "between 8 and 512")
        masked = round(self.mask_fraction * self.seq_len)
        self.check("mask_fraction", 1 <= masked <= self.seq_len - 2, "in (0, 1), at least one position of --seq-len")
        self.check("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self.check("weight_decay", 0 <= self.weight_decay < 1, "in [0, 1)")


class MaskedBert(BertForMaskedLM):
    """BERT that computes vocabulary logits at given positions only: the full [B, T, V] logits exist nowhere."""

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids [B, T], positions [N] into B*T -> logits [N, V]."""
        return self.cls(self.bert(input_ids).last_hidden_state.flatten(0, 1)[positions])


def build_data(cfg: Config) -> text.Corpus:
    return text.prepare(
        cfg.data, tokenizer=cfg.tokenizer, vocab_size=cfg.vocab_size, seq_len=cfg.seq_len, progress=engine.rank() == 0
    )


def build_student(cfg: Config, vocab_size: int) -> MaskedBert:
    """A student of one of BERT's sizes, or a checkpoint's; its vocabulary is padded to a multiple of 64."""
    padded = math.ceil(vocab_size / 64) * 64
    settings: dict[str, Any] = {"hidden_dropout_prob": cfg.dropout, "attention_probs_dropout_prob": cfg.dropout}
    torch.manual_seed(cfg.seed)
    if cfg.student in SIZES:
        layers, width = SIZES[cfg.student]
        shape: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
        student = MaskedBert(BertConfig(vocab_size=padded, num_attention_heads=width // 64, **shape, **settings))
    else:
        student = teachers.load_pretrained(
            MaskedBert, cfg.student, vocab_size, flag="--student", dtype=torch.float32, **settings
        )
        student.resize_token_embeddings(padded, mean_resizing=False)
    if cfg.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def build_teachers(cfg: Config, vocab_size: int) -> teachers.TeacherPool:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.teacher_dtype]
    models = [teachers.load_pretrained(MaskedBert, path, vocab_size, dtype=dtype) for path in cfg.teachers]
    models = [model.to(engine.device()) for model in models]
    return teachers.TeacherPool(cfg.teachers, models, columns=vocab_size, compiled=cfg.compile)


def train_step(
    cfg: Config, student: Any, pool: teachers.TeacherPool, batch: text.Step, step: int, clock: Any, stop: Any
) -> dict[str, Any]:
    """The method: one optimizer step on `batch`. Returns the step's line of the log, over all ranks."""
    kd_ratio = schedule.window_ratio(step, cfg.steps, ratio=cfg.kd_ratio, start=cfg.kd_start, stop=cfg.kd_stop)
    label_weight = 1 - kd_ratio if kd_ratio else cfg.label_weight_outside
    drawn = draw_teachers(cfg.sampler, len(pool), seed=cfg.seed, step=step) if kd_ratio else ()
    lr = cfg.lr * schedule.linear_warmup_decay(step, cfg.steps, warmup_fraction=cfg.warmup_fraction, floor=0.02)
    step_tokens = engine.total(batch.tokens)
    engine.seed_step(cfg.seed, step)
    divergence: dict[str, Any] = {
        "temperature": cfg.temperature,
        "direction": cfg.divergence.removesuffix("_kl"),
        "valid_columns": pool.columns,
    }
    losses = []
    for micro in batch.micro_batches:
        input_ids, positions, labels = engine.to_device(micro.input_ids, micro.positions, micro.labels)
        teacher_logits = None
        if drawn:
            with clock.part("teacher"):
                teacher_logits = pool.logits(drawn, (input_ids, positions), cfg.temperature)
        student_logits = student(input_ids, positions)
        supervised_N = (labels != text.IGNORE_INDEX).float()
        loss_sum, kd_loss, label_loss = softmax_kl_sum(
            student_logits, teacher_logits, labels, kd_weight=kd_ratio, label_weight=label_weight,
            row_weight_N=supervised_N, **divergence,
        )  # fmt: skip
        engine.backward_token_mean(student, loss_sum, step_tokens)
        losses.append(torch.stack([label_loss, kd_loss]))
    sample_ids = [micro.sample_ids for micro in batch.micro_batches]
    values, (tokens,) = engine.finish_step(
        student, losses, sample_ids, step_tokens, kd_ratio=kd_ratio, label_weight=label_weight, lr=lr, stop=stop
    )
    return {
        "step": step + 1,
        "samples": (step + 1) * cfg.global_batch_size,
        "tokens": (step + 1) * cfg.global_batch_size * cfg.seq_len,
        "supervised_tokens": int(tokens),
        **values,
        "temperature": cfg.temperature,
        "teacher": [pool.names[index] for index in drawn],
    }


@torch.no_grad()
def evaluate(cfg: Config, model: Any, corpus: text.Corpus) -> dict[str, float]:
    """Loss (nats), perplexity and accuracy at the validation set's fixed masked positions, over all ranks."""
    model.eval()
    sums = torch.zeros(3, device=engine.device())
    for batch in text.validation_batches(
        corpus, micro_batch_size=cfg.micro_batch_size, rank=engine.rank(), world_size=engine.world_size()
    ):
        input_ids, positions, labels = engine.to_device(batch.input_ids, batch.positions, batch.labels)
        logits = model(input_ids, positions)[:, : len(corpus.tokenizer)]
        _, label_N = softmax_kl(logits, None, labels)
        sums += torch.stack([label_N.sum(), (logits.argmax(-1) == labels).sum(), (labels != text.IGNORE_INDEX).sum()])
    loss_sum, correct, tokens = engine.total(sums).tolist()
    loss = loss_sum / tokens
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 80.0)), "eval/accuracy": correct / tokens}


def export(student: Any, corpus: text.Corpus, folder: Path) -> None:
    """Writes `hf/`: the student alone, cropped to the tokenizer's vocabulary, and the tokenizer."""
    state = engine.gathered_state_dict(student)  # every rank takes part
    if engine.rank() == 0:
        plain: Any = BertForMaskedLM(copy.deepcopy(student.module.config))
        plain.to(next(iter(state.values())).dtype).load_state_dict(state)
        plain.resize_token_embeddings(len(corpus.tokenizer), mean_resizing=False)
        report.replace_folder(folder / "hf", plain.save_pretrained, corpus.tokenizer.save_pretrained)


def prepare(cfg: Config, undo: Any) -> tuple[Path, dict[str, Any], text.Corpus]:
    """What bad input makes fail, cheapest first, before any model is built: config, models, run folder, data."""
    ds_config = engine.load_config(cfg)
    models = [("--teachers", path) for path in cfg.teachers if cfg.kd_ratio]
    models += [("--student", cfg.student)] if cfg.student not in SIZES else []
    sources = [(flag, teachers.model_source(path, flag)) for flag, path in models]
    folder = report.claim_folder(cfg, RECIPE, undo)
    corpus = build_data(cfg)
    corpus.check_batch(cfg.global_batch_size)
    report.check_data(cfg, corpus.fingerprint)
    for flag, source in sources:
        text.require_same_tokenizer(corpus.tokenizer, source, flag=flag)
    return folder, ds_config, corpus


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with cli.one_line_errors() as undo:
        cfg = cli.parse(Config, typed, preset)
        if report.says_finished(cfg):
            return 0
        folder, ds_config, corpus = engine.join(lambda: prepare(cfg, undo))
        folder, vocab_size = engine.broadcast(folder), len(corpus.tokenizer)
        checkpoint = engine.newest_checkpoint(folder / "checkpoints") if cfg.resume else None
        first = engine.step_of(checkpoint)
        closed = cfg.kd_ratio == 0 or schedule.window_closed(first, cfg.steps, stop=cfg.kd_stop)
        pool = teachers.TeacherPool((), (), columns=vocab_size) if closed else build_teachers(cfg, vocab_size)
        model = build_student(cfg, vocab_size)
        # torch multiplies the decay by the learning rate, the authors' decoupled AdamW only by its share of the peak.
        decay = cfg.weight_decay / cfg.lr
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay, fused=True
        )
        if cfg.compile:
            model.compile()
        student = engine.initialize(model, optimizer, ds_config)
        state: dict[str, Any] = {"position": (0, 0, 0), "seconds": {}}
        if checkpoint:
            state = engine.load_checkpoint(student, folder / "checkpoints", checkpoint)
        run = report.Run(folder, cfg, first=first, data=corpus.fingerprint)
        stop = engine.StopSignal(cfg.max_minutes)
    run.teachers(pool, lambda teacher: evaluate(cfg, teacher, corpus))
    clock = report.Stopwatch(state["seconds"], compiling=cfg.compile)
    batches = text.MaskedBatches(
        corpus,
        seed=cfg.seed,
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=cfg.micro_batch_size,
        rank=engine.rank(),
        world_size=engine.world_size(),
        mask_fraction=cfg.mask_fraction,
        position=text.Position(*state["position"]),
        steps=cfg.steps - first,
    )
    ahead = text.prefetch(batches, pin_memory=torch.cuda.is_available())
    for step in range(first, cfg.steps):
        if len(pool) and schedule.window_closed(step, cfg.steps, stop=cfg.kd_stop):
            pool.release()
            run.say(f"step {step}: the window has closed, the teachers are released")
        with clock.part("train"):
            with clock.part("data", on_host=True):
                batch = next(ahead)
            student.train()
            try:
                line = train_step(cfg, student, pool, batch, step, clock, stop)
            except engine.NonFiniteStepError as error:
                return run.finish("non-finite", step=step + 1, error=str(error), sample_ids=error.samples)
        last = step + 1 == cfg.steps
        if last or (not stop.agreed and (step + 1) % cfg.eval_every == 0):
            line |= evaluate(cfg, student, corpus)
        run.log(line, clock, write=last or bool(stop.agreed) or (step + 1) % cfg.log_every == 0)
        if last or stop.agreed or (step + 1) % cfg.save_every == 0:
            state = {"position": tuple(batch.position), "seconds": clock.read(wait=True)}
            engine.save_checkpoint(student, folder / "checkpoints", step + 1, state, cfg.keep)
        if stop.agreed and not last:
            return run.finish(stop.agreed, step=step + 1)
    export(student, corpus, folder)
    return run.finish("finished", step=cfg.steps)


if __name__ == "__main__":
    engine.end_process(main)
