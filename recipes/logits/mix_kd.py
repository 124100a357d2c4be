"""MIX-KD: few pairs of images are mixed, and the deviation of an image's logits is the temperature, of student and teacher alike.

Method:  loss = (1 - r) CE(z_S / sigma_S, y) + r KL(softmax(z_T / sigma_T) || softmax(z_S / sigma_S)), r = kd_ratio, sigma the deviation of
         an image's logits; a --mix-share of the images is mixed with a neighbour each, lambda ~ Beta(mixup, mixup). Evaluated: z / sigma
Source:  2022, arXiv 2211.03946, and the authors' code for CIFAR-100: no tau^2, the gradient flows through sigma_S. That code draws what
         is not mixed with replacement, so that 41 % are mixed where it says 10 %; here the share is meant. Without --teachers: CE alone
Found:   not yet run
Command: deepspeed recipes/logits/mix_kd.py --preset imagenet --teachers resnet34
Teacher: python recipes/resnet_kd.py --preset cifar --steps 4 --global-batch-size 16 --micro-batch-size 8
Smoke:   python recipes/logits/mix_kd.py --teachers {teacher} --steps 4 --global-batch-size 16 --micro-batch-size 8 --mix-share 0.5
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kd_core import classification
from kd_core.losses.divergences import forward_kl
from kd_core.losses.labels import label_loss
from kd_core.losses.targets import standardise
from kd_core.teachers.pool import TeacherPool
from kd_core.training.engine import Engine
from kd_core.training.loop import Step, start
from kd_core.training.processes import end_process
from kd_core.training.schedules import cosine_lr


@dataclass(frozen=True)
class Config(classification.Flags):
    """Partial mixup, and logits in units of their deviation. `--preset imagenet`."""

    kd_ratio: float = 0.9
    """Weight of the teacher term, in [0, 1]; the labels get the rest."""
    mixup: float = 1.0
    """Alpha of MixUp, above 0."""
    mix_share: float = 0.1
    """Share of the images that are mixed; 0: none, 1: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("kd_ratio", 0 <= self.kd_ratio <= 1, "in [0, 1]")
        self.check("mixup", 0 < self.mixup < math.inf, "a finite number above 0")
        self.check("mix_share", 0 <= self.mix_share <= 1, "in [0, 1]")
        self.check("mix_share", not (self.cached and self.mix_share), "0 for cached teachers, who saw other pixels")


def train_step(cfg: Config, student: Engine, teachers: TeacherPool, step: Step) -> None:
    """The method: one optimizer step."""
    micro_batches = [micro.mixed(cfg.mixup, 0, teachers.columns, share=cfg.mix_share) for micro in step.micro_batches]
    for micro, answer in teachers.answers(step, micro_batches):
        student_logits = standardise(student(micro.pixels))
        loss_sum = label_sum = label_loss(student_logits, micro.labels).sum()
        kd_sum = torch.zeros_like(label_sum)
        if (teacher_logits := answer()) is not None:
            kd_sum = forward_kl(student_logits, standardise(teacher_logits)).sum()
            loss_sum = (1 - cfg.kd_ratio) * label_sum + cfg.kd_ratio * kd_sum
        step.backward(student, loss_sum, label_loss=label_sum, kd_loss=kd_sum)
    step.update(student, lr=cosine_lr(cfg, step.number))


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with start(__file__, Config, typed, preset) as run:
        task = classification.Task(run)
        student = task.student()
        for step in run.steps(task.batches(), functools.partial(task.score, student, standardise)):
            train_step(run.cfg, student, task.teachers, step)
        task.export(student)
    return run.code


if __name__ == "__main__":
    end_process(main)
