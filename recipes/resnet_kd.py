"""Image classification with a distillation window: ResNet-50 on ImageNet, small ResNets on small images.

Method:  loss = (1 - r) * label_loss + r * kd_loss, r = kd_ratio inside the window, 0 outside;
         kd_loss = tau^2 * KL(teacher || student) on the student's own view, one teacher of the pool drawn per step
Source:  Blakeney et al. 2022, "Reduce, Reuse, Recycle", arXiv 2211.00683; training defaults: the authors' code
Command: deepspeed recipes/resnet_kd.py --preset baseline-90 --data imagenet/ --teachers resnet101 --kd-ratio 0.9
Smoke:   python recipes/resnet_kd.py --preset cifar --steps 4 --global-batch-size 16 --micro-batch-size 8
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from kd_core.cache import images as cached
from kd_core.cli import Preset
from kd_core.images import batches, classifiers, evaluation
from kd_core.images.flags import ImageFlags, TeacherViewFlags
from kd_core.images.resnets import average_batch_norm, synchronize_batch_norm
from kd_core.images.sources import ImageSet
from kd_core.images.views import View
from kd_core.losses.distillation import distillation_sum
from kd_core.losses.labels import label_loss
from kd_core.system.ranks import device
from kd_core.teachers import window
from kd_core.teachers.flags import DistillFlags
from kd_core.teachers.pool import TeacherPool
from kd_core.training import engine as engines
from kd_core.training.flags import TrainFlags
from kd_core.training.kept import Best, Ema
from kd_core.training.loop import Step, start
from kd_core.training.optimizers import DecoupledSGD, decay_groups
from kd_core.training.processes import end_process
from kd_core.training.schedules import cosine


@dataclass(frozen=True)
class Config(DistillFlags, TrainFlags, TeacherViewFlags, ImageFlags):
    """ResNets with a distillation window. `--preset baseline-90`, `mild-36` or `cifar`; `--load RUN_JSON`."""

    student: str = "resnet50"
    """resnet8 to resnet110 (6n + 2, for 32 x 32), torchvision's resnet18 to resnet152 and wide ones, or a run folder."""
    teachers: tuple[str, ...] = ()
    """Run folders, models of torchvision such as resnet101 or resnet101:IMAGENET1K_V1, or cache:FOLDER."""
    mixup: float = 0.0
    """Alpha of MixUp; 0: none. With --cutmix too, each micro-batch draws one of the two."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0: none."""
    resize_from: float = 1.0
    """Progressive resizing: this share of --train-size for 0.4 of training, growing until 0.8 of it; 1: none."""
    loss: Literal["ce", "bce"] = "ce"
    """On labels: cross-entropy, or binary cross-entropy summed over classes."""
    label_smoothing: float = 0.0
    """Share of a label spread over all classes; not of the teacher term."""
    blurpool: bool = False
    """Blur before every strided convolution and after the maximum pooling."""
    sync_bn: bool = False
    """Batch statistics over all ranks; otherwise each micro-batch's own."""
    momentum: float = 0.875
    """Of SGD."""
    weight_decay: float = 5e-4
    """On matrices and filters. Decoupled: the share of a weight lost per step at the peak learning rate."""
    decoupled: bool = True
    """--no-decoupled adds the weight decay to the gradient instead."""
    lr_batch_size: int | None = None
    """The batch that --lr is for, from which it is scaled linearly; default: --global-batch-size."""
    ema_half_life: int = 0
    """Evaluate and export a moving average of the weights with this half-life, in steps; 0: the weights."""
    # The authors' released settings for ResNet-50 on ImageNet.
    steps: int = 56_250
    global_batch_size: int = 2048
    micro_batch_size: int = 256
    lr: float = 2.048
    warmup_fraction: float = 8 / 90
    save_every: int = 3125
    eval_every: int = 3125

    PRESETS: ClassVar[dict[str, Preset]] = {
        # The authors' baseline (codestar12/composer-hydra-template): 90 epochs of 625 steps; the defaults above.
        "baseline-90": Preset("the authors' baseline: ResNet-50, 90 epochs of ImageNet", data="ILSVRC/imagenet-1k", lr_batch_size=2048),
        # Mosaic ResNet "mild" at its 36 epochs (mosaicml/benchmarks, blogs/resnet/recipes).
        "mild-36": Preset("Mosaic ResNet's mild recipe: 36 epochs of ImageNet",
            data="ILSVRC/imagenet-1k", steps=22_500, lr_batch_size=2048, train_size=176, eval_resize=232, blurpool=True,
            loss="bce",
            label_smoothing=0.08, resize_from=0.5, ema_half_life=100, teacher_size=0,
        ),
        # Batch, momentum and crop of He et al. 2015, section 4.2; rate and decay for 5 epochs of CIFAR-10, minutes here.
        "cifar": Preset("a small ResNet on small images, minutes on a CPU",
            student="resnet8", train_size=32, eval_resize=32, eval_size=32, crop="padded", steps=2000,
            global_batch_size=128, micro_batch_size=64, lr=0.2, lr_batch_size=None, momentum=0.9, decoupled=False,
            eval_every=500, save_every=1000, deepspeed_config="zero0_fp32_cpu.json", teacher_dtype="fp32",
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("momentum", "weight_decay", "label_smoothing"):
            self.check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self.check("resize_from", 0 < self.resize_from <= 1, "in (0, 1]")
        for name in ("mixup", "cutmix", "ema_half_life"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "a finite number, at least 0")
        most = self.steps // 4  # the average then holds at most a sixteenth of its first weights
        self.check("ema_half_life", self.ema_half_life <= most, f"at most a quarter of --steps, {most}")
        self.check("lr_batch_size", self.lr_batch_size is None or self.lr_batch_size >= 1, "at least 1")
        for name, only in (("mixup", 0), ("cutmix", 0), ("resize_from", 1)):
            possible = not self.cached or getattr(self, name) == only
            self.check(name, possible, f"{only} for cached teachers, who saw other pixels")

    @property
    def view(self) -> View:
        return replace(super().view, initial_scale=self.resize_from)

    @property
    def peak_lr(self) -> float:
        return self.lr * self.global_batch_size / (self.lr_batch_size or self.global_batch_size)


build_data = batches.build  # by its fingerprint, launch files know the runs that can share a teacher


def checked_data(cfg: Config) -> tuple[ImageSet, dict[str, int]]:
    """What bad input makes fail, before any model is built; the images, and the views of cached teachers."""
    if cfg.ema_half_life:
        engines.require_stage(cfg, 2, f"--ema-half-life {cfg.ema_half_life}")
    return cached.prepare(cfg)


def train_step(cfg: Config, student: Any, teachers: TeacherPool, step: Step) -> None:
    """The method: one optimizer step."""
    now = window.mix(cfg, step.number)
    micro_batches = [micro.mixed(cfg.mixup, cfg.cutmix, teachers.columns) for micro in step.micro_batches]
    for micro, answer in teachers.answers(step, micro_batches, temperature=now.temperature):
        logits = student(micro.pixels)
        label_sum = label_loss(logits, micro.labels, kind=cfg.loss, smoothing=cfg.label_smoothing).sum()
        loss_sum, kd_sum = now.label_weight * label_sum, torch.zeros((), device=device())
        if (teacher_logits := answer()) is not None:
            weighted, kd_sum, _ = distillation_sum(
                logits, teacher_logits, divergence=cfg.divergence, kd_weight=now.kd_ratio, temperature=now.temperature
            )
            loss_sum = loss_sum + weighted
        step.backward(student, loss_sum, label_loss=label_sum, kd_loss=kd_sum)
    lr = cfg.peak_lr * cosine(cfg, step.number)
    terms = step.update(student, lr=lr)
    step.log(**now._asdict(), loss=now.loss(terms), image_size=cfg.view.size_at(step.number, cfg.steps))


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with start(__file__, Config, typed, preset) as run:
        cfg, (data, views) = run.cfg, run.prepare(checked_data)
        classes, score = data.classes, functools.partial(evaluation.evaluate, cfg, data)
        teachers = cached.gather(run, data, score)
        bias = -math.log(len(classes)) if cfg.loss == "bce" else None
        model = classifiers.build_student(cfg.student, classes, seed=cfg.seed, blurpool=cfg.blurpool, last_bias=bias)
        if cfg.sync_bn:
            synchronize_batch_norm(model)
        sgd = DecoupledSGD if cfg.decoupled else torch.optim.SGD
        optimizer = sgd(decay_groups(model, cfg.weight_decay), lr=cfg.peak_lr, momentum=cfg.momentum)
        student = run.engine(model, optimizer, after=average_batch_norm)
        ema, best = Ema(student.module, cfg.ema_half_life), Best("eval/accuracy")
        run.keep(ema=ema, best=best)

        def evaluate() -> dict[str, float]:
            with ema.applied():
                scores = score(student)
                if best.improves(scores):
                    classifiers.export(cfg, student, classes, run.folder / "best")
            return scores

        for step in run.steps(batches.batches(run, data, **views), evaluate):
            train_step(cfg, student, teachers, step)
            ema.update(step.number + 1)
        with ema.applied():
            classifiers.export(cfg, student, classes, run.folder / "hf")
    return run.code


if __name__ == "__main__":
    end_process(main)
