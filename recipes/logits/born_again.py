"""Guided self-distillation: generations of one network, each on labels and the one before; alpha from two trainings, not from a grid.

Method:  loss = alpha |p - y|^2 + (1 - alpha) |p - p_before|^2, p = softmax(z), y the label, p_before of the generation before; the first
         has alpha 1. auto: alpha = <y - v, u - v> / |u - v|^2, clipped to [0, 1], over --held-out images: u of the first generation, v of
         one that learned from it with alpha 0; the images are of the training set, and never trained on, those evaluated play no part
Source:  Borup and Andersen 2021, arXiv 2102.13088, and their code: alpha .6, 5 generations, ResNet-50, CIFAR-10, Adam. Our reading:
         SGD, errors summed over classes (theirs are means, which Adam does not see); the estimate, exact for kernel ridge regression
Found:   not yet run
Command: python recipes/logits/born_again.py --preset imagenet --student resnet50
Smoke:   python recipes/logits/born_again.py --generations 2 --steps 4 --global-batch-size 16 --micro-batch-size 8
Kill:    --alpha 0.5 --steps 8 --save-every 3 --eval-every 4 --log-every 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import one_hot

from kd_core import classification, cli
from kd_core.images import classifiers, evaluation
from kd_core.losses.labels import label_loss
from kd_core.losses.targets import alpha_star, alpha_terms
from kd_core.runs import chain
from kd_core.system.ranks import device, total
from kd_core.teachers.pool import TeacherPool
from kd_core.training.engine import Engine
from kd_core.training.loop import Run, Step, start
from kd_core.training.processes import end_process
from kd_core.training.schedules import cosine_lr


@dataclass(frozen=True)
class Config(classification.Flags):
    """Generations of one network, each a run in a folder of --out that the same call continues. `--preset imagenet`."""

    generations: int = 3
    """How many; 1: one run alone, in --out itself, which learns from --teachers too."""
    alpha: float | Literal["auto"] = "auto"
    """Weight of the labels from the second generation on, in [0, 1]; auto: read off two trainings, by the --held-out images."""
    alpha_from: tuple[str, ...] = ()
    """For --generations 1 with --alpha auto: a run that learned from labels, and one that learned from that with --alpha 0."""
    held_out: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        auto, alone = self.alpha == "auto", self.generations == 1
        self.check("generations", self.generations >= 1, "at least 1")
        self.check("alpha", auto or 0 <= float(self.alpha) <= 1, "auto, or in [0, 1]")
        self.check("teachers", alone or not self.teachers, "empty: generations teach; with --generations 1 name one")
        two = auto and alone and bool(self.teachers)
        only = (
            "two runs, or --alpha a number" if two else "left out but for --generations 1 --teachers ... --alpha auto"
        )
        self.check("alpha_from", len(self.alpha_from) == 2 * two, only)
        self.check("held_out", self.held_out > 0 or not auto, "above 0 for --alpha auto")


def stages(cfg: Config) -> dict[str, str]:
    """Flags by the name of the run; each generation begins with other weights, and its imitation with those of its own."""
    named = {"generation1": f"--generations 1 --alpha 1 --seed {cfg.seed}"}
    pair = ""
    if cfg.alpha == "auto":
        named["imitation"] = f"--generations 1 --alpha 0 --teachers {{generation1}} --seed {cfg.seed + 1000}"
        pair = "--alpha-from {generation1} {imitation}"
    for number in range(1, cfg.generations):
        flags = f"--generations 1 --teachers {{generation{number}}} --seed {cfg.seed + 1000 * number} {pair}"
        named[f"generation{number + 1}"] = flags
    return named


@torch.no_grad()
def read_alpha(run: Run[Any], task: classification.Task) -> float:
    """The weight of the labels; by the two runs of --alpha-from once, then as run.json has it."""
    cfg, held_out = run.cfg, task.data.held_out
    if not cfg.alpha_from or held_out is None:
        return 1.0 if cfg.alpha == "auto" else float(cfg.alpha)
    if (alpha := run.recall("alpha")) is None:
        pair = [
            classifiers.load_classifier(path, task.data.classes, flag="--alpha-from", size=0).to(device()).eval()
            for path in cfg.alpha_from
        ]
        terms = torch.zeros(2, dtype=torch.float64, device=device())
        for pixels, labels, counted in evaluation.share(cfg, held_out):
            u, v = (model(pixels).softmax(-1)[counted] for model in pair)
            terms += alpha_terms(u, v, one_hot(labels[counted], u.shape[1]))
        run.update(alpha=(alpha := alpha_star(total(terms))))
    run.say(f"alpha {alpha:.3f}, by {len(held_out)} images that no generation was trained on")
    return alpha


def train_step(cfg: Config, student: Engine, teachers: TeacherPool, alpha: float, step: Step) -> None:
    """The method: one optimizer step."""
    for micro, answer in teachers.answers(step):
        student_logits = student(micro.pixels)
        loss_sum = label_sum = label_loss(student_logits, micro.labels, kind="brier").sum()
        kd_sum = torch.zeros_like(label_sum)
        if (teacher_logits := answer()) is not None:
            kd_sum = label_loss(student_logits, teacher_logits.float().softmax(-1), kind="brier").sum()
            loss_sum = alpha * label_sum + (1 - alpha) * kd_sum
        step.backward(student, loss_sum, label_loss=label_sum, kd_loss=kd_sum)
    step.update(student, lr=cosine_lr(cfg, step.number))


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with cli.one_line_errors():
        cfg = cli.parse(Config, typed, preset)
    if cfg.generations > 1:
        return chain.run(__file__, Config, typed, stages(cfg), preset)
    with start(__file__, Config, typed, preset) as run:
        task = classification.Task(run)
        alpha = read_alpha(run, task)
        student = task.student()
        for step in run.steps(task.batches(), lambda: task.score(student)):
            train_step(run.cfg, student, task.teachers, alpha, step)
        task.export(student)
    return run.code


if __name__ == "__main__":
    end_process(main)
