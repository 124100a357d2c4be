"""LELP: with few classes a teacher's logits say little; its embeddings split each class, and the student learns the subclasses.

Method:  loss = tau^2 * KL(q || softmax(z_S / tau)) over C * S outputs, no labels; q_{c,s} = p_c * softmax_s(<u_{c,s}, h - mu_c> / (beta * sigma)),
         p = softmax(z_T / tau), h the input of the teacher's head, u_c the S leading principal directions of class c in the head's null
         space, randomly rotated, sigma the deviation of <u, h - mu>. Prediction: the softmax summed over s
Source:  2024, arXiv 2409.20449; no code was published: formulas as its reviews give them. Our reading: mu_c is the class's mean, tau divides
         the student too, tau^2, beta in units of sigma, S 4. --directions random, kmeans (--beta 0.01: hard) and oracle are controls
Command: deepspeed recipes/logits/lelp.py --preset imagenet --teachers resnet50
Teacher: python recipes/resnet_kd.py --preset cifar --steps 4 --global-batch-size 16 --micro-batch-size 8 --merge-classes 2
Smoke:   python recipes/logits/lelp.py --teachers {teacher} --steps 4 --global-batch-size 16 --micro-batch-size 8 --merge-classes 2
Found:   not yet run
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kd_core import classification
from kd_core.images import evaluation
from kd_core.losses.divergences import forward_kl
from kd_core.losses.subclasses import Subclasses, known_targets
from kd_core.networks import taps
from kd_core.system.ranks import broadcast, device, gathered
from kd_core.training.engine import Engine
from kd_core.training.loop import Run, Step, start
from kd_core.training.processes import end_process
from kd_core.training.schedules import cosine_lr


@dataclass(frozen=True)
class Config(classification.Flags):
    """Pseudo-subclasses of a teacher's embeddings; one teacher, no cache. `--preset imagenet`."""

    num_subclasses: int = 4
    """S; 1 is plain distillation without labels. 4 to 8."""
    beta: float = 1.0
    """Above 0, in deviations: small, an image belongs to one subclass; large, evenly to all."""
    temperature: float = 4.0
    """tau > 0; 1 to 4."""
    directions: Literal["pca", "random", "kmeans", "oracle"] = "pca"
    """What splits a class: principal directions, random ones, clusters, or the classes that --merge-classes has merged."""
    fit_images: int = 50_000
    """Training images, in the view of evaluation, that directions are computed of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("num_subclasses", self.num_subclasses >= 1, "at least 1")
        self.check("beta", 0 < self.beta < math.inf, "a finite number above 0")
        self.check("temperature", 0 < self.temperature < math.inf, "a finite number above 0")
        self.check("fit_images", self.fit_images >= 1, "at least 1")
        self.check("teachers", len(self.teachers) <= 1, "one, whose embeddings split the classes")
        self.check(
            "directions", self.directions != "oracle" or self.merge_classes > 0, "oracle with --merge-classes only"
        )


def ask(model: torch.nn.Module, micro: Any) -> tuple[Tensor, Tensor]:
    """What a teacher says: logits, and embeddings."""
    return taps.embed(model, micro.pixels)


@torch.no_grad()
def fit(run: Run[Config], task: classification.Task) -> Subclasses:
    """The subclasses, of what all ranks have embedded; none of an oracle. A resumed run gets its own back."""
    cfg, train, (teacher,) = run.cfg, task.data.train, task.teachers.models.values()
    merged = 0 if train.parts is None or cfg.directions != "oracle" else int(train.parts.max()) + 1
    cfg.check("num_subclasses", cfg.num_subclasses >= merged, f"at least {merged}, as many classes as were merged")
    if run.first or cfg.directions == "oracle":
        return Subclasses()
    some = np.sort(np.random.default_rng(cfg.seed).permutation(len(train))[: cfg.fit_images])
    head, mine = taps.head(teacher).weight, []
    with run.clock.part("train", on_host=True):
        for pixels, labels, counted in evaluation.share(cfg, train.part(some)):
            _, embeddings = task.teachers.consult(SimpleNamespace(pixels=pixels))
            mine.append((embeddings[counted].float().cpu(), labels[counted].cpu()))
        everything = [pair for own in gathered(mine) for pair in own]
        embeddings, labels = (torch.cat(one) for one in zip(*everything, strict=True))
        fitted = Subclasses.fit(embeddings, labels, head, cfg.num_subclasses, seed=cfg.seed, directions=cfg.directions)
        return broadcast(fitted)


def train_step(cfg: Config, student: Engine, task: classification.Task, subclasses: Subclasses, step: Step) -> None:
    """The method: one optimizer step."""
    tau, parts = cfg.temperature, task.data.train.parts
    for micro, answer in task.teachers.answers(step, temperature=tau):
        student_logits, (teacher_logits, embeddings) = student(micro.pixels), answer()
        if cfg.directions == "oracle" and parts is not None:
            known = torch.from_numpy(parts[micro.sample_ids.numpy()]).to(micro.labels.device)
            targets = known_targets(teacher_logits, micro.labels, known, cfg.num_subclasses, temperature=tau)
        else:
            targets = subclasses.targets(
                teacher_logits, embeddings, temperature=tau, beta=cfg.beta * subclasses.deviation
            )
        loss_sum = forward_kl(student_logits, tau * targets, temperature=tau).sum()
        step.backward(student, loss_sum, kd_loss=loss_sum)
    step.update(student, lr=cosine_lr(cfg, step.number))


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with start(__file__, Config, typed, preset) as run:
        cfg = run.cfg
        cfg.check("teachers", bool(cfg.teachers), "given: its embeddings split the classes")
        task = classification.Task(run, ask=ask)
        student = task.student(subclasses=cfg.num_subclasses)
        subclasses = fit(run, task)
        run.keep(subclasses=subclasses)
        subclasses.to(device())
        for step in run.steps(task.batches(), lambda: task.score(student)):
            train_step(cfg, student, task, subclasses, step)
        task.export(student)
    return run.code


if __name__ == "__main__":
    end_process(main)
