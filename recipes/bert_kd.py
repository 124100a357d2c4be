"""BERT masked-language-model pretraining with a distillation window at its start.

Method:  loss = (1 - r) * label_loss + r * kd_loss, r = kd_ratio inside the window, 0 outside;
         kd_loss = tau^2 * KL(teacher || student) at masked positions, one teacher of the pool drawn per step
Source:  Blakeney et al. 2022, "Reduce, Reuse, Recycle", arXiv 2211.00683; defaults: the authors' released code
Command: deepspeed recipes/bert_kd.py --data c4 --teachers google-bert/bert-large-uncased --kd-ratio 0.9 --kd-stop 0.35
Smoke:   python recipes/bert_kd.py --student tiny --vocab-size 1024 --seq-len 32 --steps 4 --global-batch-size 8 --micro-batch-size 4 --deepspeed-config zero0_fp32_cpu.json
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from kd_core.cache import mlm
from kd_core.cli import Preset
from kd_core.losses.distillation import DIRECTIONS, distillation_sum
from kd_core.runs.sources import model_source
from kd_core.teachers import pool, sources, window
from kd_core.teachers.flags import DistillFlags
from kd_core.text import bert, corpus, masking, tokenizer
from kd_core.text.flags import MaskingFlags
from kd_core.text.pretrained import check_int8
from kd_core.training.flags import TrainFlags
from kd_core.training.loop import Step, start
from kd_core.training.processes import end_process
from kd_core.training.schedules import linear_warmup_decay


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
    adam_beta2: float = 0.98
    """Of AdamW, for the mean of squared gradients; beta 1 is 0.9."""
    initializer_range: float = 0.02
    """Standard deviation of a random student's weights."""
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

    PRESETS: ClassVar[dict[str, Preset]] = {
        "as-released": Preset(
            "the teacher term of the code that the authors released, beside --teachers and --kd-ratio 0.9",
            temperature=4.0, divergence="reverse_kl", softmax_axis="sequence",
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        size = bert.size_of(self.student)
        self.check("student", not size or size[1] % 64 == 0, "LAYERSxWIDTH with a width that 64 divides, a head's")
        by_class = self.divergence not in DIRECTIONS or self.cached
        self.check(
            "softmax_axis",
            self.softmax_axis == "class" or not by_class,
            "class beside cached teachers, and for other divergences than a KL",
        )
        with_logits = by_class or self.softmax_axis == "sequence" or self.sampler == "all" or self.draws > 1
        with_logits |= (
            any(map(sources.counted, self.teachers)) or self.teacher_placement != "device" or self.teacher_ahead
        )
        needs = (
            "off for ensembles, divergences other than a KL, a softmax over the sequence, cached and counted teachers, "
            "--teacher-placement, --teacher-ahead"
        )
        self.check("fused_head", not (self.fused_head and self.distils and with_logits), needs)
        check_int8(self)
        self.check("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self.check("adam_beta2", 0 < self.adam_beta2 < 1, "in (0, 1)")
        random = size is not None or self.initializer_range == Config.initializer_range
        self.check(
            "initializer_range",
            random and 0 < self.initializer_range < math.inf,
            "above 0, and given to a random --student",
        )
        self.check("weight_decay", 0 <= self.weight_decay < 1, "in [0, 1)")


build_data = corpus.build  # by its fingerprint, launch files know the runs that can share a teacher


def checked_data(cfg: Config) -> tuple[corpus.Corpus, dict[str, int]]:
    """What bad input makes fail, cheapest first, before any model is built: models, data, tokenizers, caches.

    Returns:
        the data, and the masks of the caches of --teachers.
    """
    models = [("--student", cfg.student)] * (bert.size_of(cfg.student) is None)
    models += [("--teachers", path) for path in cfg.teachers if window.still_needed(cfg) and sources.is_model(path)]
    found = [(flag, model_source(path, flag)) for flag, path in models]
    data = build_data(cfg)
    data.check_batch(cfg.global_batch_size)
    for flag, source in found:
        tokenizer.require_same_tokenizer(data.tokenizer, source, flag=flag)
    return data, mlm.masking(cfg, data)


def train_step(cfg: Config, student: Any, teachers: pool.TeacherPool, step: Step) -> None:
    """The method: one optimizer step."""
    now = window.mix(cfg, step.number)
    method: dict[str, Any] = {
        "divergence": cfg.divergence, "temperature": now.temperature, "kd_weight": now.kd_ratio,
        "label_weight": now.label_weight, "valid_columns": teachers.columns,
    }  # fmt: skip
    micro_batches = step.micro_batches
    if cfg.softmax_axis == "sequence" and now.kd_ratio:
        method["sequence_length"] = cfg.seq_len
        micro_batches = [micro.at_all_positions() for micro in micro_batches]
    for micro, answer in teachers.answers(step, micro_batches, temperature=now.temperature):
        method["row_weight_N"] = (micro.labels != corpus.IGNORE_INDEX).float()
        if cfg.fused_head:
            loss_sum, kd_loss, label_loss = bert.fused_losses(student, micro, answer(), **method)
        else:
            student_logits = student(*micro.inputs)
            loss_sum, kd_loss, label_loss = distillation_sum(student_logits, answer(), micro.labels, **method)
        step.backward(student, loss_sum, label_loss=label_loss, kd_loss=kd_loss)
    factor = linear_warmup_decay(
        step.number, cfg.steps, warmup_fraction=cfg.warmup_fraction, decay_fraction=cfg.decay_fraction, floor=0.02
    )
    terms = step.update(student, lr=cfg.lr * factor)
    step.log(
        **now._asdict(),
        loss=now.loss(terms),
        tokens=step.line["samples"] * cfg.seq_len,
        supervised_tokens=int(terms["rows"]),
    )


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with start(__file__, Config, typed, preset) as run:
        cfg, (data, masks) = run.cfg, run.prepare(checked_data)
        vocab_size = len(data.tokenizer)

        def evaluate(model: Any) -> dict[str, float]:
            return bert.evaluate(model, data, micro_batch_size=cfg.micro_batch_size)

        teachers = pool.gather(
            run, functools.partial(mlm.load_teacher, cfg, data), evaluate, columns=vocab_size, chance_loss=math.log(vocab_size),
            ask=bert.head_and_input if cfg.fused_head else None,
        )  # fmt: skip
        model = bert.build(
            cfg.student, vocab_size, seed=cfg.seed, seq_len=cfg.seq_len, dropout=cfg.dropout,
            gradient_checkpointing=cfg.gradient_checkpointing, initializer_range=cfg.initializer_range,
        )  # fmt: skip
        # torch multiplies the decay by the learning rate, the authors' decoupled AdamW only by its share of the peak.
        decay = cfg.weight_decay / cfg.lr
        adamw = torch.optim.AdamW(
            model.parameters(), lr=cfg.lr, betas=(0.9, cfg.adam_beta2), eps=1e-6, weight_decay=decay, fused=True
        )
        student = run.engine(model, adamw)
        for step in run.steps(masking.batches(run, data, **masks), lambda: evaluate(student)):
            train_step(cfg, student, teachers, step)
        bert.export(student, data.tokenizer, run.folder / "hf")
    return run.code


if __name__ == "__main__":
    end_process(main)
