"""MEAL V2: a trained student learns the mean of its teachers' probabilities and nothing else, without weight decay.

Method:  loss = tau^2 * KL(pbar || p_S), pbar the mean over teachers of softmax(z_T / tau); no labels; weight decay 0; --student is a trained network.
         --sampler uniform: one drawn teacher a step in place of the mean, whose expected gradient is the same. --discriminator adversarial:
         plus w * -log D(z_S), D the probability that logits are the teachers', which descends -log D(z_T) - log(1 - D(z_S)) of its own
Source:  2020, arXiv 2009.08453, and its released code (KL and the paper's cross-entropy differ by pbar's entropy, which has no gradient). That
         code trains both networks by one optimizer without a reversal, so the student descends -log(1 - D(z_S)) and helps to be
         recognised: cooperative. Our reading: D sees log-probabilities at tau, has an Adam of its own and no ReLU at its end, w 1, and a cosine
Command: deepspeed recipes/logits/meal_v2.py --preset imagenet --student resnet50:IMAGENET1K_V1 --teachers resnet152 wide_resnet101_2
Teacher: python recipes/resnet_kd.py --preset cifar --steps 4 --global-batch-size 16 --micro-batch-size 8
Smoke:   python recipes/logits/meal_v2.py --student {teacher} --teachers {teacher} {teacher} --steps 4 --global-batch-size 16 --micro-batch-size 8
Kill:    --discriminator adversarial --steps 8 --save-every 3 --eval-every 4 --log-every 1
Found:   not yet run
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kd_core import classification
from kd_core.cli import Preset
from kd_core.images.flags import ClassifierFlags
from kd_core.losses.adversarial import Discriminator, fooled, told_apart
from kd_core.losses.divergences import forward_kl
from kd_core.teachers.pool import TeacherPool
from kd_core.teachers.samplers import Sampler
from kd_core.training.engine import Engine, frozen
from kd_core.training.loop import Run, Step, start
from kd_core.training.processes import end_process
from kd_core.training.schedules import cosine_lr


@dataclass(frozen=True)
class Config(classification.Flags):
    """The mean of several teachers as the only target. `--preset imagenet`."""

    temperature: float = 1.0
    """tau > 0; the paper has 1."""
    discriminator: Literal["none", "adversarial", "cooperative"] = "none"
    """A network that tells student from teachers: the student deceives it, or helps it, as the released code does."""
    discriminator_weight: float = 1.0
    """Of the student's part in that, beside the teachers' term."""
    discriminator_lr: float = 1e-4
    """Of its Adam, constant."""
    sampler: Sampler = "all"
    lr: float = 0.01
    weight_decay: float = 0.0

    PRESETS: ClassVar[dict[str, Preset]] = {
        "imagenet": Preset("the released code's batch, rate and length (180 epochs), for a trained student",
            **ClassifierFlags.PRESETS["imagenet"] | dict(student="resnet50", global_batch_size=512, lr=0.01, weight_decay=0.0),
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("temperature", 0 < self.temperature < math.inf, "a finite number above 0")
        self.check("discriminator_weight", 0 <= self.discriminator_weight < math.inf, "a finite number, at least 0")
        self.check("discriminator_lr", 0 < self.discriminator_lr < math.inf, "a finite number above 0")


def train_step(cfg: Config, student: Engine, judge: Engine | None, teachers: TeacherPool, step: Step) -> None:
    """The method: one optimizer step, of both networks if there is a discriminator."""
    for micro, answer in teachers.answers(step, temperature=cfg.temperature):
        student_logits, teacher_logits = student(micro.pixels), answer()
        loss_sum = kd_sum = forward_kl(student_logits, teacher_logits, temperature=cfg.temperature).sum()
        terms = {"kd_loss": kd_sum}
        if judge is not None:
            ours, theirs = student_logits / cfg.temperature, teacher_logits / cfg.temperature
            step.backward(judge, told_apart(judge(theirs), judge(ours.detach())).sum())
            with frozen(judge) as module:
                terms["fooled_loss"] = fooled(module(ours), cooperative=cfg.discriminator == "cooperative").sum()
            loss_sum = kd_sum + cfg.discriminator_weight * terms["fooled_loss"]
        step.backward(student, loss_sum, **terms)
    step.update(student, lr=cosine_lr(cfg, step.number))
    if judge is not None:
        step.update(judge, lr=cfg.discriminator_lr)


def discriminator(run: Run[Config], columns: int) -> Engine | None:
    """Its engine, if there is one."""
    if run.cfg.discriminator == "none":
        return None
    model = Discriminator(columns)
    return run.engine(model, torch.optim.Adam(model.parameters(), lr=run.cfg.discriminator_lr), name="discriminator")


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with start(__file__, Config, typed, preset) as run:
        run.cfg.check("teachers", bool(run.cfg.teachers), "given: their mean is the only target")
        task = classification.Task(run)
        student = task.student()
        judge = discriminator(run, len(task.data.classes))
        for step in run.steps(task.batches(), lambda: task.score(student)):
            train_step(run.cfg, student, judge, task.teachers, step)
        task.export(student)
    return run.code


if __name__ == "__main__":
    end_process(main)
