"""Image classification with a distillation window: ResNet-50 on ImageNet, small ResNets on small images.

Method:  loss = (1 - r) * label_loss + r * kd_loss, r = kd_ratio inside the window, 0 outside;
         kd_loss = tau^2 * KL(teacher || student) on the student's own view, one teacher of the pool drawn per step
Source:  Blakeney et al. 2022, "Reduce, Reuse, Recycle", arXiv 2211.00683; training defaults: the authors' code
Command: deepspeed recipes/resnet_kd.py --preset baseline-90 --data imagenet/ --teachers resnet101 --kd-ratio 0.9
Smoke:   python recipes/resnet_kd.py --preset cifar --data synthetic --steps 4 --global-batch-size 16 --micro-batch-size 8
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from kd_core import cli
from kd_core.cache import images as cache_images
from kd_core.images import batches as images
from kd_core.images import classifiers, resnets
from kd_core.images import evaluation as classification
from kd_core.images import sources as image_sources
from kd_core.images.flags import ImageFlags
from kd_core.images.views import MIN_SIZE, View
from kd_core.losses import labels
from kd_core.losses.distillation import distillation_sum
from kd_core.runs import folders
from kd_core.runs import record as report
from kd_core.system import files, ranks
from kd_core.system.clock import resumed_clock
from kd_core.system.hashing import seed_step
from kd_core.teachers import pool as teachers
from kd_core.teachers import window
from kd_core.teachers.flags import DistillFlags
from kd_core.teachers.window import needs_teachers
from kd_core.training import checkpoints, engine, optimizers
from kd_core.training import schedules as schedule
from kd_core.training.flags import TrainFlags
from kd_core.training.kept import Ema
from kd_core.training.processes import end_process, join
from kd_core.training.stop import StopSignal

RECIPE = Path(__file__).stem


@dataclass(frozen=True)
class Config(DistillFlags, TrainFlags, ImageFlags):
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
    teacher_size: int | None = None
    """Side of the teachers' view, pixels; default: each one's own; 0: as the student's."""
    teacher_dtype: Literal["bf16", "fp32"] = "bf16"
    """What the teachers compute in."""
    # The authors' released settings for ResNet-50 on ImageNet.
    steps: int = 56_250
    global_batch_size: int = 2048
    micro_batch_size: int = 256
    lr: float = 2.048
    warmup_fraction: float = 8 / 90
    save_every: int = 3125
    eval_every: int = 3125

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # The authors' baseline (codestar12/composer-hydra-template): 90 epochs of 625 steps; the defaults above.
        "baseline-90": dict(lr_batch_size=2048),
        # Mosaic ResNet "mild" at its 36 epochs (mosaicml/benchmarks, blogs/resnet/recipes).
        "mild-36": dict(
            steps=22_500, lr_batch_size=2048, train_size=176, eval_resize=232, blurpool=True, loss="bce",
            label_smoothing=0.08, resize_from=0.5, ema_half_life=100, teacher_size=0,
        ),
        # Batch, momentum and crop of He et al. 2015, section 4.2; rate and decay for 5 epochs of CIFAR-10, minutes here.
        "cifar": dict(
            student="resnet8", train_size=32, eval_resize=32, eval_size=32, crop="padded", steps=2000,
            global_batch_size=128, micro_batch_size=64, lr=0.2, lr_batch_size=None, momentum=0.9, decoupled=False,
            eval_every=500, save_every=1000, deepspeed_config="zero0_fp32_cpu.json", teacher_dtype="fp32",
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("teacher_size", (self.teacher_size or MIN_SIZE) >= MIN_SIZE, f"0, or at least {MIN_SIZE}")
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
    def peak_lr(self) -> float:
        return self.lr * self.global_batch_size / (self.lr_batch_size or self.global_batch_size)

    @property
    def view(self) -> View:
        return replace(super().view, initial_scale=self.resize_from)


def build_data(cfg: Config) -> image_sources.ImageSet:
    return image_sources.prepare(
        cfg.data, decoded_gib=cfg.decoded_gib, max_corrupt=cfg.max_corrupt, progress=ranks.local_rank() == 0
    )


def build_student(cfg: Config, classes: Sequence[str]) -> resnets.Classifier:
    """A randomly initialised network, or a run's."""
    torch.manual_seed(cfg.seed)
    if cfg.student in resnets.NAMES:
        bias = -math.log(len(classes)) if cfg.loss == "bce" else None
        net = resnets.build_net(cfg.student, len(classes), blurpool=cfg.blurpool, last_bias=bias)
        student = resnets.Classifier(net)
    else:
        student = classifiers.load_classifier(cfg.student, classes, flag="--student", size=0)
    if cfg.sync_bn:
        resnets.synchronize_batch_norm(student)
    return student


def build_teachers(cfg: Config, classes: Sequence[str]) -> teachers.TeacherPool:
    settings: dict[str, Any] = {"flag": "--teachers", "size": cfg.teacher_size, "autocast": cfg.teacher_dtype == "bf16"}
    settings["split"] = cfg.teacher_placement == "zero3"
    return teachers.build_pool(
        cfg, lambda path: classifiers.load_teacher(path, classes, **settings), columns=len(classes)
    )


def train_step(
    cfg: Config, student: Any, pool: teachers.TeacherPool, batch: images.Step, step: int, clock: Any, stop: Any
) -> dict[str, Any]:
    """The method: one optimizer step on `batch`. Returns the step's line of the log, over all ranks."""
    now = window.distillation(cfg, step)
    lr = cfg.peak_lr * schedule.linear_warmup_cosine(step, cfg.steps, warmup_fraction=cfg.warmup_fraction)
    step_images = torch.full((), float(cfg.global_batch_size), device=ranks.device())
    seed_step(cfg.seed, step)
    losses = []
    micro_batches = [micro.mixed(cfg.mixup, cfg.cutmix, pool.columns) for micro in batch.micro_batches]
    for micro, teacher_logits in pool.answers(cfg, step, micro_batches, clock):
        logits, kd_loss = student(micro.pixels), torch.zeros((), device=ranks.device())
        loss_N = labels.label_loss(logits, micro.labels, kind=cfg.loss, smoothing=cfg.label_smoothing)
        label_loss = loss_N.sum()
        loss_sum = now.label_weight * label_loss
        if (taught := teacher_logits()) is not None:
            weighted, kd_loss, _ = distillation_sum(
                logits, taught, divergence=cfg.divergence, kd_weight=now.kd_ratio, temperature=now.temperature
            )
            loss_sum = loss_sum + weighted
        engine.backward_token_mean(student, loss_sum, step_images)
        losses.append(torch.stack([label_loss.detach(), kd_loss, micro.corrupt]))
    sample_ids = [micro.sample_ids for micro in batch.micro_batches]
    values, (num_corrupt, _) = engine.finish_step(
        student, losses, sample_ids, step_images, kd_ratio=now.kd_ratio, label_weight=now.label_weight, lr=lr, stop=stop
    )
    resnets.average_batch_norm(student.module)
    return {
        "step": step + 1,
        "samples": (step + 1) * cfg.global_batch_size,
        **values,
        "temperature": now.temperature,
        "teacher": pool.drawn_names(cfg, step),
        "image_size": cfg.view.size_at(step, cfg.steps),
        "corrupt_images": int(num_corrupt),
    }


@torch.no_grad()
def evaluate(cfg: Config, model: Any, data: image_sources.ImageSet) -> dict[str, float]:
    """Loss (nats), top-1, top-5 and expected calibration error on the validation images, over all ranks."""
    model.eval()
    batches = images.ValidationBatches(
        data.validation, cfg.eval_resize, cfg.eval_size, cfg.micro_batch_size, ranks.rank(), ranks.world_size()
    )
    sums = classification.validation_sums(model, batches, workers=images.num_workers(cfg.workers, data.validation))
    return classification.classification_metrics(ranks.total(sums))


def export(cfg: Config, student: Any, data: image_sources.ImageSet, folder: Path) -> None:
    """Writes `folder`: the student alone as a torchvision state dict, and what it is and sees."""
    state = engine.gathered_state_dict(student)  # every rank takes part
    if ranks.rank() == 0:
        view = {"image_size": cfg.train_size, "eval_resize": cfg.eval_resize, "eval_size": cfg.eval_size}
        files.replace_folder(
            folder, lambda hidden: classifiers.save(hidden, student.module, state, data.classes, **view)
        )


def prepare(cfg: Config, undo: Any) -> tuple[Path, dict[str, Any], image_sources.ImageSet, dict[str, int]]:
    """What bad input makes fail, cheapest first, before any model is built: config, models, run folder, data."""
    ds_config = engine.load_config(cfg)
    if cfg.ema_half_life and ds_config.get("zero_optimization", {}).get("stage") == 3:
        raise ValueError("--ema-half-life must be 0 with ZeRO stage 3, which splits the weights; use stage 0 to 2")
    for path in cfg.teachers if needs_teachers(cfg) else ():
        classifiers.check_source(path, "--teachers")
    if cfg.student not in resnets.NAMES:
        classifiers.check_student(cfg.student)
    folder = folders.claim_folder(cfg, RECIPE, undo)
    data = build_data(cfg)
    data.check_batch(cfg.global_batch_size)
    folders.check_data(cfg, data.fingerprint)
    # DeepSpeed's list of optimizers tested with ZeRO has no SGD; the project's tests do.
    ds_config |= {"zero_allow_untested_optimizer": True}
    return folder, ds_config, data, cache_images.views(cfg, data)


def main(typed: Sequence[str] | None = None, preset: str = "") -> int:
    """Runs the recipe with the command line `typed` over a launch file's `preset`; returns the exit code."""
    with cli.one_line_errors() as undo:
        cfg = cli.parse(Config, typed, preset)
        if folders.says_finished(cfg):
            return 0
        folder, ds_config, data, views = join(lambda: prepare(cfg, undo))
        folder = ranks.broadcast(folder)
        checkpoint = checkpoints.newest_checkpoint(folder / "checkpoints") if cfg.resume else None
        first = checkpoints.step_of(checkpoint)
        released = teachers.TeacherPool(cfg.teachers, (), columns=len(data.classes))
        pool = released if window.window_closed(cfg, first) else build_teachers(cfg, data.classes)
        model = build_student(cfg, data.classes)
        if cfg.compile:
            model.compile()
        sgd = optimizers.DecoupledSGD if cfg.decoupled else torch.optim.SGD
        optimizer = sgd(optimizers.decay_groups(model, cfg.weight_decay), lr=cfg.peak_lr, momentum=cfg.momentum)
        student = engine.initialize(model, optimizer, ds_config)
        ema = Ema(student.module, cfg.ema_half_life)
        state: dict[str, Any] = {"best": -1.0}
        if checkpoint:
            state = checkpoints.load_checkpoint(student, folder / "checkpoints", checkpoint)
            ema.load(state["ema"])
        run = report.Run(folder, cfg, first=first, data=data.fingerprint)
        stop = StopSignal(cfg.max_minutes)
        clock = resumed_clock(state, compiling=cfg.compile)
        run.teachers(pool, lambda teacher: evaluate(cfg, teacher, data), clock, chance_loss=math.log(len(data.classes)))
    batches = images.TrainBatches(
        data.train, cfg.view, cfg.steps, cfg.seed, cfg.global_batch_size, cfg.micro_batch_size,
        ranks.rank(), ranks.world_size(), nvjpeg=cfg.decoder == "nvjpeg" and data.train.encoded is not None, **views,
    )  # fmt: skip
    ahead = images.steps(batches, first, workers=images.num_workers(cfg.workers, data.train, cfg.randaugment))
    best, corrupt = state["best"], 0
    for step in range(first, cfg.steps):
        if len(pool) and window.window_closed(cfg, step):
            pool.release()
            run.say(f"step {step}: the window has closed, the teachers are released")
        with clock.part("train"):
            with clock.part("data", on_host=True):
                batch = next(ahead)
            student.train()
            try:
                line = train_step(cfg, student, pool, batch, step, clock, stop)
            except engine.NonFiniteStepError as error:
                return run.finish("non-finite", step=step + 1, error=str(error), sample_ids=error.samples)
            ema.update(step + 1)
        corrupt += line["corrupt_images"]
        if corrupt > cfg.max_corrupt * max(len(data.train), (step + 1 - first) * cfg.global_batch_size):
            return run.finish("corrupt-images", step=step + 1, error=f"{corrupt} images could not be decoded")
        last = step + 1 == cfg.steps
        if last or (not stop.agreed and (step + 1) % cfg.eval_every == 0):
            with ema.applied():
                line |= evaluate(cfg, student, data)
                if line["eval/accuracy"] > best:
                    best = line["eval/accuracy"]
                    export(cfg, student, data, folder / "best")
        run.log(line, clock, write=last or bool(stop.agreed) or (step + 1) % cfg.log_every == 0)
        if last or stop.agreed or (step + 1) % cfg.save_every == 0:
            clocks = ranks.gathered((clock.read(wait=True), clock.calls))
            state = {"clocks": clocks, "best": best, "ema": ema.average}
            checkpoints.save_checkpoint(student, folder / "checkpoints", step + 1, state, cfg.keep)
        if stop.agreed and not last:
            return run.finish(stop.agreed, step=step + 1)
    pool.release()
    with ema.applied():
        export(cfg, student, data, folder / "hf")
    return run.finish("finished", step=cfg.steps)


if __name__ == "__main__":
    end_process(main)
