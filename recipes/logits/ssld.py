"""SSLD: the student follows the teacher without labels, on labelled and on chosen unlabelled images, then shortly on the labelled alone.

Method:  loss = tau^2 * JS(p_T, p_S) = tau^2 / 2 * (KL(p_T || m) + KL(p_S || m)), m = (p_T + p_S) / 2, on the labelled images and on the unlabelled
         ones that are, for any class, among the --per-class of the highest p_T; in the last --fine-tune of the steps on the labelled, same loss
Source:  2021, arXiv 2103.05959, and PaddleClas' documentation (360 epochs, then about 30). Its files train by Jeffreys' divergence times the
         number of classes, more than four times JS; here other divergences have JS's curvature where the models agree. Our reading: an image may
         be chosen for several classes and is seen as often as others; near-duplicates of validation images are not looked for: remove them before
Command: deepspeed recipes/logits/ssld.py --preset imagenet --unlabelled imagenet22k/ --teachers resnet152
Teacher: python recipes/resnet_kd.py --preset cifar --steps 4 --global-batch-size 16 --micro-batch-size 8
Smoke:   python recipes/logits/ssld.py --held-out 0.5 --per-class 20 --fine-tune 0.25 --teachers {teacher} --steps 4 --global-batch-size 16 --micro-batch-size 8
Found:   not yet run
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kd_core import classification
from kd_core.cache import images as cached
from kd_core.images import batches, selection, sources
from kd_core.losses.divergences import forward_kl, jeffreys, jensen_shannon
from kd_core.system.ranks import local_rank
from kd_core.teachers.pool import TeacherPool
from kd_core.teachers.window import first_step
from kd_core.training.engine import Engine
from kd_core.training.loop import Run, Step, start
from kd_core.training.processes import end_process
from kd_core.training.schedules import linear_warmup_cosine

# Each times what gives it the second derivative of JS where teacher and student agree: rates tuned for one suit all.
DIVERGENCES = {
    "jensen_shannon": (jensen_shannon, 1.0),
    "forward_kl": (forward_kl, 1 / 4),
    "jeffreys": (jeffreys, 1 / 8),
}


@dataclass(frozen=True)
class Config(classification.Flags):
    """Distillation without labels on labelled and unlabelled images, and a fine-tuning. `--preset imagenet`."""

    unlabelled: str = ""
    """Folder of images, or what --data takes; labels there are not read. Default: the images of --held-out."""
    select: Literal["top", "random", "all", "none"] = "top"
    """Which unlabelled images: the teachers' best of each class, as many drawn, all, or none."""
    per_class: int = 4000
    """Images chosen for each class; an image may be chosen for several."""
    divergence: Literal["jensen_shannon", "forward_kl", "jeffreys"] = "jensen_shannon"
    """Of teacher and student, at equal curvature where they agree."""
    temperature: float = 1.0
    """tau > 0; the paper has 1."""
    fine_tune: float = 0.05
    """Share of the steps, at the end, that see the labelled images alone; below 1."""
    fine_tune_lr: float = 0.1
    """Where the learning rate begins there, as a share of --lr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("per_class", self.per_class >= 1, "at least 1")
        self.check("temperature", 0 < self.temperature < math.inf, "a finite number above 0")
        self.check("fine_tune", 0 <= self.fine_tune < 1, "in [0, 1)")
        self.check("fine_tune_lr", 0 < self.fine_tune_lr < math.inf, "a finite number above 0")
        self.check("teachers", not self.cached, "models: they are asked about images that caches do not hold")

    @property
    def tuning(self) -> int:
        """The first step of the fine-tuning."""
        return first_step(1 - self.fine_tune, self.steps)

    def lr_at(self, step: int) -> float:
        """Half a cosine, and another for the fine-tuning."""
        if step < self.tuning:
            return self.lr * linear_warmup_cosine(step, self.tuning, warmup_fraction=self.warmup_fraction)
        own, of = step - self.tuning, self.steps - self.tuning
        return self.lr * self.fine_tune_lr * linear_warmup_cosine(own, of, warmup_fraction=0)


def prepare(cfg: Config) -> tuple[sources.ImageSet, dict[str, int]]:
    """What bad input makes fail: of the images, `held_out` are the unlabelled ones."""
    data, views = cached.prepare(cfg)
    if cfg.unlabelled:
        split, fingerprint = sources.prepare_unlabelled(
            cfg.unlabelled, flag="--unlabelled", decoded_gib=cfg.decoded_gib, max_corrupt=cfg.max_corrupt,
            progress=local_rank() == 0,
        )  # fmt: skip
        data = replace(data, held_out=split, fingerprint=f"{data.fingerprint}, {fingerprint} unlabelled")
    there = 0 if data.held_out is None else len(data.held_out)
    cfg.check("select", cfg.select == "none" or there > 0, "none, or --unlabelled or --held-out given")
    enough = cfg.select not in ("top", "random") or cfg.per_class <= there
    cfg.check("per_class", enough, f"at most the number of unlabelled images, {there}")
    return data, views


def choose(run: Run[Config], task: classification.Task) -> np.ndarray:
    """Numbers of the unlabelled images that the run learns from; random ones are as many as the best of each class."""
    cfg, unlabelled = run.cfg, task.data.held_out
    if unlabelled is None or cfg.select in ("all", "none"):
        return np.arange(len(unlabelled) if unlabelled is not None and cfg.select == "all" else 0)
    top = selection.top_per_class(
        cfg, unlabelled, lambda micro: task.teachers.consult(micro).float().softmax(-1), cfg.per_class
    )
    ids = np.unique(top)
    return ids if cfg.select == "top" else np.random.default_rng(cfg.seed).permutation(len(unlabelled))[: len(ids)]


def images(cfg: Config, task: classification.Task, ids: np.ndarray) -> Iterator[batches.Step]:
    """Of both kinds as one set, then of the labelled alone."""
    both = train = task.data.train
    if task.data.held_out is not None and len(ids):
        both = train.joined(task.data.held_out.part(ids))
    yield from task.batches(both, range(cfg.tuning))
    yield from task.batches(train, range(cfg.tuning, cfg.steps))


def train_step(cfg: Config, student: Engine, teachers: TeacherPool, step: Step) -> None:
    """The method: one optimizer step."""
    divergence, scale = DIVERGENCES[cfg.divergence]
    for micro, answer in teachers.answers(step, temperature=cfg.temperature):
        loss_sum = scale * divergence(student(micro.pixels), answer(), temperature=cfg.temperature).sum()
        step.backward(student, loss_sum, kd_loss=loss_sum)
    step.update(student, lr=cfg.lr_at(step.number))


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with start(__file__, Config, typed, preset) as run:
        run.cfg.check("teachers", bool(run.cfg.teachers), "given: without labels nobody else says what is right")
        task = classification.Task(run, prepare)
        student = task.student()
        ids = selection.kept(run, lambda: choose(run, task))
        for step in run.steps(images(run.cfg, task, ids), lambda: task.score(student)):
            train_step(run.cfg, student, task.teachers, step)
        task.export(student)
    return run.code


if __name__ == "__main__":
    end_process(main)
