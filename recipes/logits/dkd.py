"""Decoupled knowledge distillation: what the teacher says of the true class and what of the others, weighted apart.

Method:  loss = label_loss + w * (alpha * class_kl + beta * others_kl), w rising from 0 to 1 over --kd-warmup of the run;
         class_kl = tau^2 KL of (p(y), 1 - p(y)), others_kl = tau^2 KL over the classes but y, teacher against student
Source:  Zhao et al. 2022, arXiv 2203.08679, equation 7; weights, tau and warm-up: the authors' code for CIFAR-100 (there w rises
         by epochs over 20 of 240; here by steps). ImageNet, ResNet-34 to ResNet-18: beta 0.5, tau 1, one epoch of 100
Command: deepspeed recipes/logits/dkd.py --preset imagenet --teachers resnet34 --beta 0.5 --temperature 1 --kd-warmup 0.01
Teacher: python recipes/resnet_kd.py --preset cifar --steps 4 --global-batch-size 16 --micro-batch-size 8
Smoke:   python recipes/logits/dkd.py --teachers {teacher} --steps 4 --global-batch-size 16 --micro-batch-size 8
Found:   CIFAR-100 at 16 x 16, 3 epochs, five seeds: -0.90 points (-2.25 to 0.44) against plain distillation, not shown; 10.3 more
         than labels (results/methods/dkd)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kd_core import classification
from kd_core.losses.decoupled import decoupled_kl
from kd_core.losses.labels import label_loss
from kd_core.teachers.pool import TeacherPool
from kd_core.training.engine import Engine
from kd_core.training.loop import Step, start
from kd_core.training.processes import end_process
from kd_core.training.schedules import cosine_lr


@dataclass(frozen=True)
class Config(classification.Flags):
    """Decoupled knowledge distillation; without --teachers the labels alone. `--preset imagenet`."""

    alpha: float = 1.0
    """Weight of the term on the true class."""
    beta: float = 8.0
    """Weight of the term on the other classes; the authors take 0.5 to 8, less where the teacher is less sure."""
    temperature: float = 4.0
    """tau > 0, of both terms."""
    kd_warmup: float = 1 / 12
    """Share of the run over which both terms' weight rises from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "a finite number, at least 0")
        self.check("temperature", 0 < self.temperature < math.inf, "a finite number above 0")
        self.check("kd_warmup", 0 <= self.kd_warmup <= 1, "in [0, 1]")


def train_step(cfg: Config, student: Engine, teachers: TeacherPool, step: Step) -> None:
    """The method: one optimizer step."""
    kd_weight = min(1.0, step.number / max(1, round(cfg.kd_warmup * cfg.steps)))
    for micro, answer in teachers.answers(step, temperature=cfg.temperature):
        student_logits = student(micro.pixels)
        label_sum = label_loss(student_logits, micro.labels).sum()
        class_kl = others_kl = torch.zeros_like(label_sum)
        if (teacher_logits := answer()) is not None:
            parts = decoupled_kl(student_logits, teacher_logits, micro.labels, temperature=cfg.temperature)
            class_kl, others_kl = (part.sum() for part in parts)
        loss_sum = label_sum + kd_weight * (cfg.alpha * class_kl + cfg.beta * others_kl)
        step.backward(student, loss_sum, label_loss=label_sum, class_kl=class_kl, others_kl=others_kl)
    step.update(student, lr=cosine_lr(cfg, step.number))
    step.log(kd_weight=kd_weight)


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with start(__file__, Config, typed, preset) as run:
        task = classification.Task(run)
        student = task.student()
        for step in run.steps(task.batches(), lambda: task.score(student)):
            train_step(run.cfg, student, task.teachers, step)
        task.export(student)
    return run.code


if __name__ == "__main__":
    end_process(main)
