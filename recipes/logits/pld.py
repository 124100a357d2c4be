"""Plackett-Luce distillation: the student learns the teacher's order of all classes, the true one moved to its head.

Method:  loss = sum_k q(pi_k) (log sum_{j >= k} exp(s(pi_j)) - s(pi_k)), pi = the true class, then the others by falling teacher
         logit, q = softmax(teacher / teacher_temperature); in place of label loss and KL alike, with no weight between them
Source:  2025, arXiv 2506.12542; no code was published. Default: the temperature for CIFAR-100; the paper has 1 for ImageNet
Found:   not yet run
Command: deepspeed recipes/logits/pld.py --preset imagenet --teachers resnet152 --teacher-temperature 1
Teacher: python recipes/resnet_kd.py --preset cifar --steps 4 --global-batch-size 16 --micro-batch-size 8
Smoke:   python recipes/logits/pld.py --teachers {teacher} --steps 4 --global-batch-size 16 --micro-batch-size 8
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kd_core import classification
from kd_core.losses.labels import label_loss
from kd_core.losses.ranking import plackett_luce
from kd_core.teachers.pool import TeacherPool
from kd_core.training.engine import Engine
from kd_core.training.loop import Step, start
from kd_core.training.processes import end_process
from kd_core.training.schedules import cosine_lr


@dataclass(frozen=True)
class Config(classification.Flags):
    """Plackett-Luce distillation; without --teachers the labels alone. `--preset imagenet`."""

    teacher_temperature: float = 4.0
    """> 0; higher: places further down the ranking count more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("teacher_temperature", 0 < self.teacher_temperature < math.inf, "a finite number above 0")


def train_step(cfg: Config, student: Engine, teachers: TeacherPool, step: Step) -> None:
    """The method: one optimizer step."""
    temperature = cfg.teacher_temperature
    for micro, answer in teachers.answers(step, temperature=temperature):
        student_logits = student(micro.pixels)
        loss_sum = label_sum = label_loss(student_logits, micro.labels).sum()
        if (teacher_logits := answer()) is not None:
            loss_sum = plackett_luce(
                student_logits, teacher_logits, micro.labels, teacher_temperature=temperature
            ).sum()
        step.backward(student, loss_sum, label_loss=label_sum)
    step.update(student, lr=cosine_lr(cfg, step.number))


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
