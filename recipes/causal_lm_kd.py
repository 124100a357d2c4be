"""Causal language models (Llama, Qwen, Gemma, GPT and others) distilled from larger ones, on text or on prompts and responses.

Method:  loss = (1 - r) * label_loss + r * kd_loss, r = kd_ratio inside the window, 0 outside; a mean over supervised tokens;
         kd_loss = tau^2 * KL(teacher || student) by default, one teacher of the pool drawn per step
Source:  Hinton et al. 2015, arXiv 1503.02531; window and draw: Blakeney et al. 2022, arXiv 2211.00683; other divergences: Agarwal
         et al. 2023, arXiv 2306.13649, Ko et al. 2024, arXiv 2402.03898. Our reading: tau^2 for all of them but total variation
Command: deepspeed recipes/causal_lm_kd.py --data c4 --tokenizer HuggingFaceTB/SmolLM2-135M --student 135M --teachers HuggingFaceTB/SmolLM2-360M HuggingFaceTB/SmolLM2-1.7B --kd-ratio 0.9 --kd-stop 0.35
Teacher: --student 2x64 --kd-ratio 0
Smoke:   python recipes/causal_lm_kd.py --student 1x64 --teachers {teacher} --kd-ratio 0.9 --kd-stop 0.5 --vocab-size 512 --seq-len 32 --steps 4 --global-batch-size 8 --micro-batch-size 4 --deepspeed-config zero0_fp32_cpu.json
Found:   bits per byte of 2 layers of width 128, from 4 of 256 that had twice as long; 3 seeds, equal steps. Wikipedia, 400 steps: labels 2.841,
         KL to the end 2.548, in the window 2.614, reverse 2.762. GSM8K's answers, 250 steps: 2.213, 2.095, 2.133, reverse 2.391.
         Window less labels -0.228 (-0.366 to -0.089) and -0.080 (-0.134 to -0.026). Time to equal quality has not been measured
         (results/methods/causal_lm, causal_lm_responses)
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from kd_core.cli import Preset
from kd_core.losses.distillation import distillation_sum
from kd_core.runs.sources import model_source
from kd_core.system.ranks import device, rank, world_size
from kd_core.teachers import pool, window
from kd_core.teachers.flags import DistillFlags
from kd_core.text import causal, causal_lm
from kd_core.text.causal_tokenizer import align
from kd_core.text.corpus import Corpus
from kd_core.text.flags import CausalTextFlags
from kd_core.text.pretrained import check_int8
from kd_core.training.flags import TrainFlags
from kd_core.training.loop import Step, start
from kd_core.training.optimizers import decay_groups
from kd_core.training.processes import end_process
from kd_core.training.schedules import cosine_lr


@dataclass(frozen=True)
class Config(DistillFlags, TrainFlags, CausalTextFlags):
    """Causal language models with a distillation window. `--load RUN_JSON` starts from a saved run's flags."""

    student: str = "135M"
    """135M, 360M, 1B, 3B, 8B or LAYERSxWIDTH, as 6x256 (Llama-shaped, random), or a checkpoint (./6x256)."""
    teacher_dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    """Weights and activations of the teachers; int8: weights of 8 bits below the head, bf16 otherwise (torchao)."""
    beta: float = 0.5
    """In (0, 1): the teacher's share of the mixture, of jensen_shannon and skew_kl (DistiLLM: 0.1)."""
    logits_mib: float = 256
    """Logits of a micro-batch that need more are never held, on a GPU none: their losses are taken a chunk at a time."""
    weight_decay: float = 0.1
    """Of matrices, by AdamW."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    seq_len: int = 2048
    """Tokens per row."""
    steps: int = 20_000
    global_batch_size: int = 512
    micro_batch_size: int = 8
    lr: float = 1e-3
    warmup_fraction: float = 0.02
    clip: float = 1.0

    PRESETS: ClassVar[dict[str, Preset]] = {
        "responses": Preset(
            "fine-tuning on prompts and responses, beside --data, --student, --teachers and --kd-ratio",
            seq_len=1024, kd_stop=1.0, steps=2000, global_batch_size=64, micro_batch_size=4, lr=5e-5, weight_decay=0.0,
            warmup_fraction=0.03, eval_every=250, save_every=500,
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        size = causal_lm.size_of(self.student)
        heads = not size or size["hidden_size"] % causal_lm.HEAD_WIDTH == 0
        self.check("student", heads, f"LAYERSxWIDTH with a width that {causal_lm.HEAD_WIDTH} divides, a head's")
        self.check("beta", 0 < self.beta < 1, "in (0, 1); at its ends the divergence is 0 or a KL")
        self.check("logits_mib", 0 <= self.logits_mib < math.inf, "a finite number, at least 0")
        self.check("weight_decay", 0 <= self.weight_decay < 1, "in [0, 1)")
        check_int8(self)
        self.check("teachers", not self.cached, "models; this recipe reads no caches of answers")

    @property
    def whole_logits(self) -> bool:
        """Whether teachers can only say their logits, as their heads are not at hand when the loss is taken."""
        moved = self.teacher_placement in ("host", "zero3") or self.teacher_ahead
        return self.distils and (self.sampler == "all" or self.draws > 1 or moved)

    def mib_of_logits(self, columns: int) -> float:
        """Of one model's, of a micro-batch in float32."""
        return self.micro_batch_size * self.seq_len * columns * 4 / 2**20

    def in_chunks(self, columns: int) -> bool:
        """Whether losses are taken from hidden states, a chunk of rows at a time, and logits never held."""
        return not self.whole_logits and (device().type == "cuda" or self.mib_of_logits(columns) > self.logits_mib)


build_data = causal.build  # by its fingerprint, launch files know the runs that can share a teacher


def checked_data(cfg: Config) -> tuple[Corpus, int]:
    """What bad input makes fail, cheapest first, before any model is built: models, data, tokenizers, sizes.

    Returns:
        the data, and the columns of logits that mean the same token in all models.
    """
    models = [("--student", cfg.student)] * (causal_lm.size_of(cfg.student) is None)
    models += [("--teachers", path) for path in cfg.teachers if window.still_needed(cfg)]
    found = [(flag, model_source(path, flag)) for flag, path in models]
    data = build_data(cfg)
    data.check_batch(cfg.global_batch_size)
    columns = align(data.tokenizer, found)
    mib = cfg.mib_of_logits(columns)
    if cfg.whole_logits and mib > cfg.logits_mib:
        raise ValueError(
            f"--logits-mib {cfg.logits_mib:g}: ensembles, --teacher-placement host or zero3 and --teacher-ahead hold the logits of "
            f"a micro-batch, here {mib:.0f} MiB; lower --micro-batch-size or --seq-len, raise --logits-mib, or leave them out"
        )
    return data, columns


def train_step(cfg: Config, student: Any, teachers: pool.TeacherPool, step: Step) -> None:
    """The method: one optimizer step."""
    now = window.mix(cfg, step.number)
    method: dict[str, Any] = {
        "divergence": cfg.divergence, "beta": cfg.beta, "temperature": now.temperature, "kd_weight": now.kd_ratio,
        "label_weight": now.label_weight, "valid_columns": teachers.columns,
    }  # fmt: skip
    for micro, answer in teachers.answers(step, temperature=now.temperature):
        if cfg.in_chunks(method["valid_columns"]):
            loss_sum, kd_loss, label_loss = student(*micro.inputs, answer(), micro.targets, **method)
        else:
            loss_sum, kd_loss, label_loss = distillation_sum(student(*micro.inputs), answer(), micro.targets, **method)
        step.backward(student, loss_sum, label_loss=label_loss, kd_loss=kd_loss)
    terms = step.update(student, lr=cosine_lr(cfg, step.number))
    step.log(
        **now._asdict(),
        loss=now.loss(terms),
        tokens=step.line["samples"] * cfg.seq_len,
        supervised_tokens=int(terms["rows"]),
    )


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with start(__file__, Config, typed, preset) as run:
        cfg, (data, columns) = run.cfg, run.prepare(checked_data)

        def evaluate(model: Any, beside: Sequence[Any] = ()) -> dict[str, float]:
            batches = causal.validation_batches(
                data, micro_batch_size=cfg.micro_batch_size, rank=rank(), world_size=world_size()
            )
            return causal_lm.evaluate(
                model, data.tokenizer, batches, columns=columns, teachers=beside, ensemble=cfg.ensemble
            )

        teachers = pool.gather(
            run, functools.partial(causal_lm.load_teacher, cfg, columns), evaluate, columns=columns,
            chance_loss=math.log(columns), ask=causal_lm.head_and_input if cfg.in_chunks(columns) else None,
        )  # fmt: skip
        model = causal_lm.build(cfg, data.tokenizer)
        groups = decay_groups(model, cfg.weight_decay)
        student = run.engine(model, torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True))
        for step in run.steps(causal.batches(run, data), lambda: evaluate(student, teachers.at_hand())):
            train_step(cfg, student, teachers, step)
        causal_lm.export(student, data.tokenizer, run.folder / "hf")
    return run.code


if __name__ == "__main__":
    end_process(main)
