"""BERT masked-language-model pretraining with a distillation window at its start.

Method:  loss = (1 - r) * label_loss + r * kd_loss, r = kd_ratio inside the window, 0 outside;
         kd_loss = tau^2 * KL(teacher || student) at masked positions, one teacher of the pool drawn per step
Source:  Blakeney et al. 2022, "Reduce, Reuse, Recycle", arXiv 2211.00683; defaults: the authors' released code
Command: deepspeed recipes/bert_kd.py --data c4 --teachers google-bert/bert-large-uncased --kd-ratio 0.9 --kd-stop 0.35
Smoke:   python recipes/bert_kd.py --student tiny --vocab-size 1024 --seq-len 32 --steps 4 --global-batch-size 8 --micro-batch-size 4 --deepspeed-config zero0_fp32_cpu.json
"""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM
from transformers.utils.logging import disable_progress_bar

from kd_core import cli
from kd_core.cache import mlm as cache_mlm
from kd_core.kernels.linear_softmax_kl import LinearSoftmaxKL
from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.losses.distillation import distillation_sum
from kd_core.runs import folders
from kd_core.runs import record as report
from kd_core.runs.sources import model_source
from kd_core.system import files, ranks
from kd_core.system.ahead import prefetch
from kd_core.system.clock import resumed_clock
from kd_core.system.hashing import seed_step
from kd_core.teachers import pool as teachers
from kd_core.teachers import window
from kd_core.teachers.flags import DistillFlags
from kd_core.teachers.sources import cache_folder
from kd_core.teachers.window import needs_teachers
from kd_core.text import masking as text
from kd_core.text.corpus import IGNORE_INDEX, Corpus, prepare
from kd_core.text.flags import MaskingFlags
from kd_core.text.order import Position
from kd_core.text.pretrained import int8_weights, load_pretrained
from kd_core.text.tokenizer import require_same_tokenizer
from kd_core.training import checkpoints, engine
from kd_core.training import schedules as schedule
from kd_core.training.flags import TrainFlags
from kd_core.training.processes import end_process, join
from kd_core.training.stop import StopSignal

RECIPE = Path(__file__).stem
disable_progress_bar()  # Hugging Face's, for files that load in a moment
# Layers and width of Turc et al. 2019 (arXiv 1908.08962) and Devlin et al. 2018; heads of 64, feed-forward 4 x width.
SIZES = dict(tiny=(2, 128), mini=(4, 256), small=(4, 512), medium=(8, 512), base=(12, 768), large=(24, 1024))


def size_of(student: str) -> tuple[int, int] | None:
    """Layers and width of a name in SIZES or of LAYERSxWIDTH; None for a checkpoint."""
    grid = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", student)
    return (int(grid[1]), int(grid[2])) if grid else SIZES.get(student)


@dataclass(frozen=True)
class Config(DistillFlags, TrainFlags, MaskingFlags):
    """BERT pretraining with a distillation window. `--load RUN_JSON` starts from a saved run's flags."""

    student: str = "base"
    """tiny, mini, small, medium, base, large or LAYERSxWIDTH, as 6x256 (random), or a BERT checkpoint (./6x256)."""
    teacher_dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    """Weights and activations of the teachers; int8: weights of 8 bits below the head, bf16 otherwise (torchao)."""
    softmax_axis: Literal["class", "sequence"] = "class"
    """sequence: the teacher term's softmax runs over all positions of a sequence, as in the authors' released code."""
    weight_decay: float = 1e-5
    """Decoupled: the share of a weight that is lost per step at the peak learning rate."""
    dropout: float = 0.1
    """On hidden states and attention."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    fused_head: bool = False
    """Never hold the logits: measured on CPUs as fast, with less memory from 64 MiB of them on."""
    # The authors' released settings for BERT-base on C4.
    steps: int = 70_000
    global_batch_size: int = 4096
    micro_batch_size: int = 128
    save_every: int = 3500
    eval_every: int = 3500

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # The teacher term of the code that the authors released, beside --teachers and --kd-ratio 0.9.
        "as-released": dict(temperature=4.0, divergence="reverse_kl", softmax_axis="sequence"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        size = size_of(self.student)
        self.check("student", not size or size[1] % 64 == 0, "LAYERSxWIDTH with a width that 64 divides, a head's")
        by_class = self.divergence == "mse" or self.cached
        self.check("softmax_axis", self.softmax_axis == "class" or not by_class, "class for mse and cached teachers")
        with_logits = by_class or self.softmax_axis == "sequence" or self.sampler == "all" or self.draws > 1
        with_logits |= self.teacher_placement != "device" or self.teacher_ahead
        needs = (
            "off for ensembles, mse, a softmax over the sequence, cached teachers, --teacher-placement, --teacher-ahead"
        )
        self.check("fused_head", not (self.fused_head and self.distils and with_logits), needs)
        in_8_bits = self.teacher_dtype == "int8"
        self.check(
            "teacher_dtype",
            not in_8_bits or bool(find_spec("torchao")),
            "bf16 or fp32 without torchao, pip install torchao",
        )
        fixed = in_8_bits and self.teacher_placement in ("host", "zero3")
        self.check("teacher_placement", not fixed, "device or sharded for teachers in int8")
        self.check("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self.check("weight_decay", 0 <= self.weight_decay < 1, "in [0, 1)")


class MaskedBert(BertForMaskedLM):
    """BERT that computes vocabulary logits at given positions only: the full [B, T, V] logits exist nowhere."""

    def forward(
        self, input_ids: Tensor, positions: Tensor, *teacher_and_labels: Any, head: bool = True, **options: Any
    ) -> Any:
        """input_ids [B, T], positions [N] into B*T -> logits [N, V]; losses, given what they need; or the head's input."""
        hidden_ND = self.cls.predictions.transform(self.bert(input_ids).last_hidden_state.flatten(0, 1)[positions])
        return self.cls.predictions.decoder(hidden_ND, *teacher_and_labels, **options) if head else hidden_ND


def build_data(cfg: Config) -> Corpus:
    return prepare(
        cfg.data, tokenizer=cfg.tokenizer, vocab_size=cfg.vocab_size, seq_len=cfg.seq_len, progress=ranks.rank() == 0
    )


def build_student(cfg: Config, vocab_size: int) -> MaskedBert:
    """A student of one of BERT's sizes, or a checkpoint's; its vocabulary is padded to a multiple of 64."""
    padded = math.ceil(vocab_size / 64) * 64
    settings: dict[str, Any] = {"hidden_dropout_prob": cfg.dropout, "attention_probs_dropout_prob": cfg.dropout}
    torch.manual_seed(cfg.seed)
    if size := size_of(cfg.student):
        layers, width = size
        shape: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
        student = MaskedBert(BertConfig(vocab_size=padded, num_attention_heads=width // 64, **shape, **settings))
    else:
        student = load_pretrained(
            MaskedBert, cfg.student, vocab_size, flag="--student", seq_len=cfg.seq_len, dtype=torch.float32, **settings
        )
        student.resize_token_embeddings(padded, mean_resizing=False)
    student.cls.predictions.decoder.__class__ = LinearSoftmaxKL  # the same linear layer, able to give losses
    if cfg.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def build_teachers(cfg: Config, vocab_size: int) -> teachers.TeacherPool:
    settings: dict[str, Any] = {"dtype": torch.float32 if cfg.teacher_dtype == "fp32" else torch.bfloat16}
    if cfg.teacher_dtype == "int8":
        settings["quantization_config"] = int8_weights(keep=["cls"])

    def load(path: str) -> torch.nn.Module:
        if folder := cache_folder(path):
            return cache_mlm.CachedBert(folder, vocab_size)
        return load_pretrained(MaskedBert, path, vocab_size, seq_len=cfg.seq_len, **settings)

    return teachers.build_pool(cfg, load, columns=vocab_size)


def micro_losses(
    cfg: Config, student: Any, pool: teachers.TeacherPool, step: int, micro_batches: Sequence[text.MicroBatch], clock: Any,
    **method: Any,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Of each micro-batch, sums over its supervised positions: the loss, its teacher term and its label term."""
    if not cfg.fused_head:
        for micro, teacher_logits in pool.answers(cfg, step, micro_batches, clock):
            logits, weight_N = student(*micro.inputs), (micro.labels != IGNORE_INDEX).float()
            yield distillation_sum(logits, teacher_logits(), micro.labels, row_weight_N=weight_N, **method)
        return
    method["direction"] = "reverse" if method.pop("divergence") == "reverse_kl" else "forward"
    for micro in micro_batches:
        micro = micro.to(ranks.device())
        hidden = weight = bias = None
        for index in pool.draw(cfg, step):  # one, or none
            teacher: Any = pool.models[index]
            with clock.part("teacher"), clock.part(f"teacher/{index}"), torch.no_grad():
                hidden = teacher(*micro.inputs, head=False)
            weight, bias = teacher.cls.predictions.decoder.weight, teacher.cls.predictions.decoder.bias
        weight_N = (micro.labels != IGNORE_INDEX).float()
        method |= {"row_weight_N": weight_N, "teacher_bias_V": bias}
        yield student(*micro.inputs, hidden, weight, micro.labels, **method)


def train_step(
    cfg: Config, student: Any, pool: teachers.TeacherPool, batch: text.Step, step: int, clock: Any, stop: Any
) -> dict[str, Any]:
    """The method: one optimizer step on `batch`. Returns the step's line of the log, over all ranks."""
    now = window.distillation(cfg, step)
    lr = cfg.lr * schedule.linear_warmup_decay(step, cfg.steps, warmup_fraction=cfg.warmup_fraction, floor=0.02)
    step_tokens = ranks.total(batch.tokens)
    seed_step(cfg.seed, step)
    method: dict[str, Any] = {
        "divergence": cfg.divergence,
        "temperature": now.temperature,
        "kd_weight": now.kd_ratio,
        "label_weight": now.label_weight,
        "valid_columns": pool.columns,
    }
    micro_batches = batch.micro_batches
    if cfg.softmax_axis == "sequence" and now.kd_ratio:
        method["sequence_length"] = cfg.seq_len
        micro_batches = [micro.at_all_positions() for micro in micro_batches]
    losses = []
    for loss_sum, kd_loss, label_loss in micro_losses(cfg, student, pool, step, micro_batches, clock, **method):
        engine.backward_token_mean(student, loss_sum, step_tokens)
        losses.append(torch.stack([label_loss, kd_loss]))
    sample_ids = [micro.sample_ids for micro in batch.micro_batches]
    values, (tokens,) = engine.finish_step(
        student, losses, sample_ids, step_tokens, kd_ratio=now.kd_ratio, label_weight=now.label_weight, lr=lr, stop=stop
    )
    return {
        "step": step + 1,
        "samples": (step + 1) * cfg.global_batch_size,
        "tokens": (step + 1) * cfg.global_batch_size * cfg.seq_len,
        "supervised_tokens": int(tokens),
        **values,
        "temperature": now.temperature,
        "teacher": pool.drawn_names(cfg, step),
    }


@torch.no_grad()
def evaluate(cfg: Config, model: Any, corpus: Corpus) -> dict[str, float]:
    """Loss (nats), perplexity and accuracy at the validation set's fixed masked positions, over all ranks."""
    model.eval()
    sums = torch.zeros(3, device=ranks.device())
    for batch in text.validation_batches(
        corpus, micro_batch_size=cfg.micro_batch_size, rank=ranks.rank(), world_size=ranks.world_size()
    ):
        input_ids, positions, labels = ranks.to_device(batch.input_ids, batch.positions, batch.labels)
        logits = model(input_ids, positions)[:, : len(corpus.tokenizer)]
        _, label_N = softmax_kl(logits, None, labels)
        sums += torch.stack([label_N.sum(), (logits.argmax(-1) == labels).sum(), (labels != IGNORE_INDEX).sum()])
    loss_sum, correct, tokens = ranks.total(sums).tolist()
    loss = loss_sum / tokens
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 80.0)), "eval/accuracy": correct / tokens}


def export(student: Any, corpus: Corpus, folder: Path) -> None:
    """Writes `hf/`: the student alone, cropped to the tokenizer's vocabulary, and the tokenizer."""
    state = engine.gathered_state_dict(student)  # every rank takes part
    if ranks.rank() == 0:
        plain: Any = BertForMaskedLM(copy.deepcopy(student.module.config))
        plain.to(next(iter(state.values())).dtype).load_state_dict(state)
        plain.resize_token_embeddings(len(corpus.tokenizer), mean_resizing=False)
        files.replace_folder(folder / "hf", plain.save_pretrained, corpus.tokenizer.save_pretrained)


def checked(cfg: Config, undo: Any) -> tuple[Path, dict[str, Any], Corpus, dict[str, int]]:
    """What bad input makes fail, cheapest first, before any model is built: config, models, run folder, data."""
    ds_config = engine.load_config(cfg)
    needed = needs_teachers(cfg)
    models = [("--teachers", path) for path in cfg.teachers if needed and not cache_folder(path)]
    models += [("--student", cfg.student)] if size_of(cfg.student) is None else []
    sources = [(flag, model_source(path, flag)) for flag, path in models]
    folder = folders.claim_folder(cfg, RECIPE, undo)
    corpus = build_data(cfg)
    corpus.check_batch(cfg.global_batch_size)
    folders.check_data(cfg, corpus.fingerprint)
    for flag, source in sources:
        require_same_tokenizer(corpus.tokenizer, source, flag=flag)
    return folder, ds_config, corpus, cache_mlm.masking(cfg, corpus)


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with cli.one_line_errors() as undo:
        cfg = cli.parse(Config, typed, preset)
        if folders.says_finished(cfg):
            return 0
        folder, ds_config, corpus, masking = join(lambda: checked(cfg, undo))
        folder, vocab_size = ranks.broadcast(folder), len(corpus.tokenizer)
        checkpoint = checkpoints.newest_checkpoint(folder / "checkpoints") if cfg.resume else None
        first = checkpoints.step_of(checkpoint)
        closed = window.window_closed(cfg, first)
        pool = teachers.TeacherPool(cfg.teachers, (), columns=vocab_size) if closed else build_teachers(cfg, vocab_size)
        model = build_student(cfg, vocab_size)
        # torch multiplies the decay by the learning rate, the authors' decoupled AdamW only by its share of the peak.
        decay = cfg.weight_decay / cfg.lr
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay, fused=True
        )
        if cfg.compile:
            model.compile()
        student = engine.initialize(model, optimizer, ds_config)
        state: dict[str, Any] = {"position": (0, 0, 0)}
        if checkpoint:
            state = checkpoints.load_checkpoint(student, folder / "checkpoints", checkpoint)
        run = report.Run(folder, cfg, first=first, data=corpus.fingerprint)
        stop = StopSignal(cfg.max_minutes)
        clock = resumed_clock(state, compiling=cfg.compile)
        run.teachers(pool, lambda teacher: evaluate(cfg, teacher, corpus), clock, chance_loss=math.log(vocab_size))
    batches = text.MaskedBatches(
        corpus,
        seed=cfg.seed,
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=cfg.micro_batch_size,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        mask_fraction=cfg.mask_fraction,
        **masking,
        position=Position(*state["position"]),
        steps=cfg.steps - first,
    )
    ahead = prefetch(batches, pin_memory=torch.cuda.is_available())
    for step in range(first, cfg.steps):
        if len(pool) and window.window_closed(cfg, step):
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
            state = {"position": tuple(batch.position), "clocks": ranks.gathered((clock.read(wait=True), clock.calls))}
            checkpoints.save_checkpoint(student, folder / "checkpoints", step + 1, state, cfg.keep)
        if stop.agreed and not last:
            return run.finish(stop.agreed, step=step + 1)
    pool.release()
    export(student, corpus, folder)
    return run.finish("finished", step=cfg.steps)


if __name__ == "__main__":
    end_process(main)
