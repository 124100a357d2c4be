"""Cached answers for image classification: a teacher's logits of every training image under a few views of it.

A record holds one image under one pattern of crop, flip and RandAugment: all C logits, as the model gives them, or the top
k (kd_core/cache/logits.py). The views follow from the cache's own seed, and epoch e of a run uses pattern e mod M: so every
--seed can share them, and teacher and student see the same pixels.

Shapes: B images, C classes.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kd_core.cache import logits, records
from kd_core.cli import Preset
from kd_core.images import classifiers, sources
from kd_core.images.batches import MicroBatch, ValidationBatches, load, num_workers, on_device, training_batch
from kd_core.images.batches import build as build_data
from kd_core.images.evaluation import classification_metrics, seen, validation_sums
from kd_core.images.flags import ImageFlags, TeacherViewFlags
from kd_core.images.resnets import NAMES
from kd_core.images.sources import ImageSet
from kd_core.system import ranks
from kd_core.system.digests import weights_digest
from kd_core.teachers import pool
from kd_core.teachers.pool import TeacherPool
from kd_core.teachers.sources import cache_folder
from kd_core.teachers.window import still_needed
from kd_core.training.loop import Run
from kd_core.training.processes import join


@dataclass(frozen=True)
class BuildFlags(logits.BuildFlags, TeacherViewFlags, ImageFlags):
    """Computes a classifier's answers for every training image once; what was killed is continued by the same command.

    `--preset baseline-90`, `mild-36` or `cifar`: the views of the recipe's preset.
    """

    GROUP: ClassVar[str] = "cache"
    view_patterns: int = 4
    """Different views of each image: epoch e of a run uses pattern e mod this."""
    view_seed: int = 17
    """Of the views."""
    micro_batch_size: int = 256

    AGREE = ("train_size", "crop", "min_scale", "randaugment", "decoder", "teacher_size", "teacher_dtype")
    SHARED = ("view_seed", "view_patterns")
    PRESETS: ClassVar[dict[str, Preset]] = {
        "baseline-90": Preset("views of the recipe of that name", data="ILSVRC/imagenet-1k"),
        "mild-36": Preset(
            "views of the recipe of that name",
            data="ILSVRC/imagenet-1k",
            train_size=176,
            eval_resize=232,
            teacher_size=0,
        ),
        "cifar": Preset(
            "views of small images",
            train_size=32,
            eval_resize=32,
            eval_size=32,
            crop="padded",
            micro_batch_size=64,
            teacher_dtype="fp32",
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("view_patterns", self.view_patterns >= 1, "at least 1")
        self.check("view_seed", self.view_seed >= 0, "at least 0")


# --- building ---------------------------------------------------------------------------------------------------------


def build(flags: BuildFlags) -> None:
    """Fills `--out` with the answers of `--teacher`; joins the process group.

    Raises:
        FileNotFoundError, ValueError: as `sources.prepare`, `classifiers.load_classifier` and `records.build`.
    """
    classifiers.check_source(flags.teacher, "--teacher")
    data = join(lambda: build_data(flags))
    columns = len(data.classes)
    flags.check("top_k", flags.top_k < columns, f"below the number of classes, {columns}")
    model = classifiers.load_teacher(
        flags.teacher, data.classes, flag="--teacher", size=flags.teacher_size, autocast=flags.teacher_dtype == "bf16"
    )
    model.eval().requires_grad_(False).to(ranks.device())
    settings = {
        "kind": "images",
        "teacher": flags.teacher,
        "weights": weights_digest(model),
        **_source(data),
        **flags.settings,
    }
    layout = records.Layout(
        flags.fields("logits", 1, columns), len(data.train), flags.view_patterns, flags.micro_batch_size
    )
    unreadable: set[int] = set()

    def answer(indices: range) -> np.ndarray:
        return layout.pack(indices, _answers(flags, data, model, layout.batches(indices), unreadable))

    records.build(
        Path(flags.out), settings, layout, answer, lambda _: None, functools.partial(_score, flags, data, model)
    )


@dataclass(frozen=True, eq=False)
class _Views(Dataset[MicroBatch]):
    """Micro-batches of given images under given patterns."""

    flags: BuildFlags
    split: sources.Split
    batches: Sequence[tuple[np.ndarray, np.ndarray]]

    def __getitem__(self, number: int) -> MicroBatch:
        flags = self.flags
        view = flags.view
        nvjpeg = flags.decoder == "nvjpeg" and self.split.encoded is not None
        return training_batch(self.split, view, view.size, flags.view_seed, *self.batches[number], nvjpeg=nvjpeg)


@torch.no_grad()
def _answers(
    flags: BuildFlags,
    data: ImageSet,
    model: Any,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    unreadable: set[int],
) -> Iterator[dict[str, Tensor]]:
    """The answers of `batches`. A run asks for an unreadable image's successor, so that its own record does not matter."""
    workers = num_workers(flags.workers, data.train, flags.randaugment)
    made = load(_Views(flags, data.train, batches), range(len(batches)), workers=workers)
    for (ids_B, _), micro in zip(batches, made, strict=True):
        unreadable.update(ids_B[ids_B != micro.sample_ids.numpy()].tolist())
        sources.check_corrupt(len(unreadable), len(data.train), flags.max_corrupt, flags.data)
        logits_BC = model(on_device(micro, ranks.device()))
        if flags.top_k:
            yield logits.top_k(logits_BC, flags.top_k, flags.temperatures)
        else:
            yield {"logits": logits_BC}


def _score(flags: BuildFlags, data: ImageSet, model: Any) -> dict[str, float]:
    """The teacher on the validation images, as the recipe measures it."""
    batches = ValidationBatches(
        data.validation, flags.eval_resize, flags.eval_size, flags.micro_batch_size, rank=0, world_size=1
    )
    workers = num_workers(flags.workers, data.validation)
    return classification_metrics(validation_sums(model, seen(batches, workers=workers)))


# --- using ------------------------------------------------------------------------------------------------------------


def views(cfg: Any, data: ImageSet) -> dict[str, int]:
    """Checks the caches of `--teachers` against the run, as `logits.check`.

    Returns:
        `view_seed` and `view_patterns` of `batches.TrainBatches`, which the caches share; empty without one.
    """
    return logits.check(cfg, BuildFlags, {"kind": "images", **_source(data)})


def prepare(cfg: Any) -> tuple[ImageSet, dict[str, int]]:
    """What bad input makes fail, cheapest first, before any model is built: models, data, caches; for `Run.prepare`.

    Args:
        cfg: `ImageFlags`, `TrainFlags`, `TeacherFlags` and `TeacherViewFlags` with a `student`.

    Returns:
        the images, and the `views` of the caches of --teachers.
    """
    for path in cfg.teachers if still_needed(cfg) else ():
        if not cache_folder(path):
            classifiers.check_source(path, "--teachers")
    if cfg.student not in NAMES:
        classifiers.check_student(cfg.student)
    data = build_data(cfg)
    data.check_batch(cfg.global_batch_size)
    return data, views(cfg, data)


def gather(run: Run[Any], data: ImageSet, score: Callable[[Any], dict[str, float]], **asked: Any) -> TeacherPool:
    """The teachers of an image recipe: `pool.gather`, which takes what is `asked`."""
    load = functools.partial(load_teacher, run.cfg, data.classes)
    columns = len(data.classes)
    return pool.gather(run, load, score, columns=columns, chance_loss=math.log(columns), **asked)


def load_teacher(cfg: Any, classes: Sequence[str], path: str) -> nn.Module:
    """What answers for `path` of --teachers, on the CPU: records that `views` has checked, or a classifier.

    Args:
        cfg: `TeacherFlags` with `teacher_size` and `teacher_dtype`.

    Raises:
        ValueError: as `classifiers.load_classifier`.
    """
    if folder := cache_folder(path):
        return logits.CachedLogits(folder, len(classes))
    return classifiers.load_teacher(
        path, classes, flag="--teachers", size=cfg.teacher_size, autocast=cfg.teacher_dtype == "bf16",
        split=cfg.teacher_placement == "zero3",
    )  # fmt: skip


def _source(data: ImageSet) -> dict[str, str]:
    names = hashlib.sha256(json.dumps(data.classes).encode()).hexdigest()[:16]
    return {"data": data.fingerprint, "classes": names}
