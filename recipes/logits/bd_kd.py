"""Balanced divergence: two networks train together, each on labels and on the other; per image the KL that corrects the student counts more.

Method:  student: label_loss + w * tau^2 * (w_T KL(p_T || p_S) + w_S KL(p_S || p_T)), w_T = delta where the teacher's entropy at
         temperature 1 is above the student's, w_S = delta where it is below, else 1; teacher: label_loss + w * tau^2 * KL(p_T || p_S)
Source:  Amara et al. 2022, arXiv 2212.12965; no code was published, the rule for delta is that of a re-implementation (ABKD, ICML
         2025, which takes 3). Our reading: delta 2, w 1, tau 4, and the teacher's own term, whose target is the student
Command: deepspeed recipes/logits/bd_kd.py --preset imagenet --teacher resnet34
Smoke:   python recipes/logits/bd_kd.py --teacher resnet14 --steps 4 --global-batch-size 16 --micro-batch-size 8
Found:   not yet run
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kd_core import classification
from kd_core.images.classifiers import check_student
from kd_core.images.resnets import NAMES
from kd_core.losses.balanced import bd_kd
from kd_core.losses.divergences import forward_kl, reverse_kl
from kd_core.losses.labels import label_loss
from kd_core.teachers.pool import TeacherPool
from kd_core.training.engine import Engine
from kd_core.training.loop import Step, start
from kd_core.training.processes import end_process
from kd_core.training.schedules import cosine_lr


@dataclass(frozen=True)
class Config(classification.Flags):
    """Balanced divergence between a student and a teacher that trains beside it. `--preset imagenet`."""

    teacher: str = "resnet20"
    """Network that trains beside the student, or a run that goes on training; named as --student is."""
    divergence: Literal["balanced", "forward", "reverse"] = "balanced"
    """What the student is drawn to the teacher by."""
    delta: float = 2.0
    """Weight of the KL that corrects the student, at least 1; 1 gives their sum. 2 or 3."""
    temperature: float = 4.0
    """tau > 0."""
    kd_weight: float = 1.0
    """Weight of the divergences beside the labels; 0 trains both apart."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher not in NAMES:
            check_student(self.teacher, "--teacher")
        self.check("teachers", not self.teachers, "empty: the teacher of this method is --teacher, which trains too")
        self.check("delta", 1 <= self.delta < math.inf, "a finite number, at least 1")
        self.check("temperature", 0 < self.temperature < math.inf, "a finite number above 0")
        self.check("kd_weight", 0 <= self.kd_weight < math.inf, "a finite number, at least 0")


def train_step(cfg: Config, student: Engine, teacher: Engine, no_teachers: TeacherPool, step: Step) -> None:
    """The method: one optimizer step of both networks."""
    for micro, _ in no_teachers.answers(step):
        logits, teachers = student(micro.pixels), teacher(micro.pixels)
        if cfg.divergence == "balanced":
            kd = bd_kd(logits, teachers, temperature=cfg.temperature, delta=cfg.delta)
        else:
            kl = forward_kl if cfg.divergence == "forward" else reverse_kl
            kd = kl(logits, teachers, temperature=cfg.temperature)
        label_sum, kd_sum = label_loss(logits, micro.labels).sum(), kd.sum()
        step.backward(student, label_sum + cfg.kd_weight * kd_sum, label_loss=label_sum, kd_loss=kd_sum)
        label_sum = label_loss(teachers, micro.labels).sum()
        kd_sum = reverse_kl(
            teachers, logits, temperature=cfg.temperature
        ).sum()  # of the network that it trains to the other
        step.backward(teacher, label_sum + cfg.kd_weight * kd_sum, label_loss=label_sum, kd_loss=kd_sum)
    for engine in (student, teacher):
        step.update(engine, lr=cosine_lr(cfg, step.number))


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with start(__file__, Config, typed, preset) as run:
        task = classification.Task(run)
        student, teacher = task.student(), task.student(run.cfg.teacher, "teacher")
        for step in run.steps(task.batches(), lambda: task.score(student)):
            train_step(run.cfg, student, teacher, task.teachers, step)
        task.export(student)
    return run.code


if __name__ == "__main__":
    end_process(main)
