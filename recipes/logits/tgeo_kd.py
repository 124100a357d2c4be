"""TGeo-KD: how much of an image's loss is the teacher's is learned, from where student, teacher and truth stand to each other.

Method:  loss = alpha * tau^2 * KL(p_T || p_S) + (1 - alpha) * CE, alpha = sigmoid(MLP([S, T, G, B, (B-S)^2, (G-S)^2, (T-S)^2, (T-G)^2, (B-G)^2])) of
         each image, S and T the probabilities, G the truth, B the teacher's mean in that class. The MLP descends the CE of --held-out images
         after one step of the student's head along that loss, an Adam of its own
Source:  2023, arXiv 2312.15112, whose text does not say how it is solved: edges, MLP and Adam's rate .1 and decay .05 are a
         re-implementation's. Our reading: the step ahead is the head's alone, whose gradient is linear in alpha, so that no gradient of a gradient
         is taken and both networks have DeepSpeed engines; a step uses the alpha before its update; Adam's decay is decoupled, as added to so
         small a gradient it was all that moved alpha. Other --ratio are controls: constant, linear decay, p_T of the truth
Command: deepspeed recipes/logits/tgeo_kd.py --preset imagenet --held-out 0.02 --teachers resnet34
Teacher: python recipes/resnet_kd.py --preset cifar --steps 4 --global-batch-size 16 --micro-batch-size 8
Smoke:   python recipes/logits/tgeo_kd.py --teachers {teacher} --steps 4 --global-batch-size 16 --micro-batch-size 8 --corrupted-classes 3
Found:   not yet run
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from kd_core import classification
from kd_core.images import evaluation
from kd_core.losses.divergences import forward_kl
from kd_core.losses.geometry import TrilateralRatio, class_means, class_sums, look_ahead, mixed_gradient
from kd_core.losses.labels import label_loss
from kd_core.losses.targets import confused
from kd_core.networks import taps
from kd_core.system.ranks import device, total
from kd_core.training.engine import Engine, require_stage
from kd_core.training.loop import Run, Step, start
from kd_core.training.processes import end_process
from kd_core.training.schedules import cosine_lr


@dataclass(frozen=True)
class Config(classification.Flags):
    """A learned share of the teacher in each image's loss. `--preset imagenet`."""

    ratio: Literal["learned", "constant", "linear", "confidence"] = "learned"
    """Share of the teacher: learned; --kd-ratio; that, down to 0 at the end; or its probability of the true class."""
    kd_ratio: float = 0.9
    """Of constant and linear, in [0, 1]."""
    temperature: float = 4.0
    """tau > 0."""
    ratio_lr: float = 0.1
    """Of the ratio's Adam, constant."""
    corrupted_classes: int = 0
    """The teachers take these first classes for one another, each for the next; 0: none."""
    held_out: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("kd_ratio", 0 <= self.kd_ratio <= 1, "in [0, 1]")
        self.check("temperature", 0 < self.temperature < math.inf, "a finite number above 0")
        self.check("ratio_lr", 0 < self.ratio_lr < math.inf, "a finite number above 0")
        self.check("corrupted_classes", self.corrupted_classes == 0 or self.corrupted_classes >= 2, "0, or at least 2")
        self.check("held_out", self.held_out > 0 or self.ratio != "learned", "above 0 for --ratio learned")
        self.check("teachers", not self.cached, "models: they are asked about images that caches do not hold")


def says(task: classification.Task, cfg: Config, pixels: Tensor) -> Tensor:
    """What all teachers say of images of no step."""
    return confused(task.teachers.consult(SimpleNamespace(inputs=(pixels,))), cfg.corrupted_classes)


@torch.no_grad()
def fit(run: Run[Config], task: classification.Task, ratio: Any) -> None:
    """Sets the teachers' means by class, of the training images in the view of evaluation; a resumed run has them in its checkpoint."""
    sums = torch.zeros(len(ratio.means_CC), len(ratio.means_CC) + 1, dtype=torch.float64, device=device())
    if run.cfg.ratio == "learned" and not run.first:
        with run.clock.part("train", on_host=True):
            for pixels, labels, counted in evaluation.share(run.cfg, task.data.train):
                sums += class_sums(says(task, run.cfg, pixels)[counted], labels[counted])
            ratio.means_CC.copy_(class_means(total(sums)))


@torch.no_grad()
def score(task: classification.Task, cfg: Config, student: Engine, ratio: Engine) -> dict[str, float]:
    """Of the validation images; by themselves those of corrupted and of clean classes, and the ratios there."""
    scores, sums = task.score(student), torch.zeros(2, 3, device=device())
    for pixels, labels, counted in evaluation.share(cfg, task.data.validation) if len(task.teachers) else ():
        logits, teacher_logits = student(pixels), says(task, cfg, pixels)
        hits, alpha = (logits.argmax(1) == labels).float(), ratio(logits, teacher_logits, labels)
        rows, clean = torch.stack([counted.float(), hits, alpha], 1), (labels >= cfg.corrupted_classes).long()
        sums.index_add_(0, clean[counted], rows[counted])
    for name, (images, hits, alpha) in zip(("corrupted", "clean"), total(sums).tolist(), strict=True):
        if images:
            own = {f"eval/ratio_{name}": alpha / images} if cfg.ratio == "learned" else {}
            scores |= {f"eval/accuracy_{name}": hits / images, **own}
    return scores


def train_step(cfg: Config, student: Engine, ratio: Engine, task: classification.Task, step: Step, others: Any) -> None:
    """The method: one optimizer step of the student, and one of the ratio by the images `others`."""
    lr, tau, head = cosine_lr(cfg, step.number), cfg.temperature, taps.head(student.module)
    for number, (micro, answer) in enumerate(task.teachers.answers(step, temperature=tau)):
        student_logits, embeddings = taps.embed(student, micro.pixels)
        rows = student_logits, confused(answer(), cfg.corrupted_classes), micro.labels
        if cfg.ratio == "learned":
            alpha, other = ratio(*rows), others.micro_batches[number].to(device())
            gradient = mixed_gradient(alpha, *rows, temperature=tau)
            seen = taps.embed_evaluated(student.module, other.pixels)
            step.backward(ratio, look_ahead(head, embeddings, gradient, seen, other.labels, lr=lr).sum())
        elif cfg.ratio == "confidence":
            alpha = rows[1].float().softmax(-1).gather(1, micro.labels[:, None]).squeeze(1)
        else:
            now = cfg.kd_ratio * (1 - step.number / cfg.steps if cfg.ratio == "linear" else 1)
            alpha = torch.full(micro.labels.shape, now, device=device())
        alpha, label = alpha.detach(), label_loss(student_logits, micro.labels)
        kd = forward_kl(*rows[:2], temperature=tau)
        terms = {"label_loss": label.sum(), "kd_loss": kd.sum(), "alpha": alpha.sum()}
        step.backward(student, (alpha * kd + (1 - alpha) * label).sum(), **terms)
    step.update(student, lr=lr)
    if cfg.ratio == "learned":
        step.update(ratio, lr=cfg.ratio_lr)


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with start(__file__, Config, typed, preset) as run:
        cfg = run.cfg
        cfg.check("teachers", bool(cfg.teachers), "given: without one there is no share of it")
        require_stage(cfg, 2, "the step ahead, which reads the head's whole weight,")
        task = classification.Task(run)
        columns, there = len(task.data.classes), len(task.data.held_out or ())
        cfg.check("corrupted_classes", cfg.corrupted_classes <= columns, f"at most the number of classes, {columns}")
        enough = there >= cfg.global_batch_size or cfg.ratio != "learned"
        cfg.check("held_out", enough, f"enough for a batch of {cfg.global_batch_size} images; it holds {there} out")
        student, model = task.student(), TrilateralRatio(columns)
        # Decoupled decay and no epsilon to speak of: through a step of the size of --lr the gradient is small, at the end 1e-6.
        adam = torch.optim.AdamW(model.parameters(), lr=cfg.ratio_lr, weight_decay=0.05, eps=1e-15)
        ratio = run.engine(model, adam, name="ratio")
        fit(run, task, ratio.module)
        others = task.batches(task.data.held_out) if cfg.ratio == "learned" else itertools.repeat(None)
        for step in run.steps(task.batches(), lambda: score(task, cfg, student, ratio)):
            train_step(cfg, student, ratio, task, step, next(others))
        task.export(student)
    return run.code


if __name__ == "__main__":
    end_process(main)
