"""The flags of a run or a cache that reads images."""

import dataclasses
import math
from typing import Literal

import torch

from kd_core.cli import Flags
from kd_core.images.views import MIN_SIZE, View


@dataclasses.dataclass(frozen=True)
class ImageFlags(Flags):
    """Source, views for training and evaluation, and what decodes."""

    data: str = "ILSVRC/imagenet-1k"
    """Folder <split>/<class>/<image> or a .tar of it, parquet, a hub name, or synthetic[:CLASSESxSIDE] (noise)."""
    train_size: int = 224
    """Side of a training view, pixels; smaller than --eval-size is FixRes."""
    eval_resize: int = 256
    """Shorter side of an evaluated image, pixels."""
    eval_size: int = 224
    """Side of its central crop, pixels."""
    crop: Literal["resized", "padded"] = "resized"
    """resized: random part, stretched; padded: shift by up to an eighth of the side (small images)."""
    min_scale: float = 0.08
    """Smallest share of the image's area in a resized crop."""
    randaugment: int = 0
    """Magnitude of RandAugment, 1 to 30; 0: none."""
    decoded_gib: float = 2.0
    """Data up to this size is held decoded, in files that all ranks of a machine share."""
    workers: int | None = None
    """Processes per rank that decode; default: none for data held decoded, else the rank's share of the cores."""
    decoder: Literal["cpu", "nvjpeg"] = "cpu"
    """nvjpeg: the GPU decodes and resizes the training images (torchvision's nvJPEG), workers only read."""
    max_corrupt: float = 0.001
    """Share of the training images that may be unreadable before the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_size", "eval_size", "eval_resize"):
            self.check(name, getattr(self, name) >= MIN_SIZE, f"at least {MIN_SIZE}")
        self.check("eval_size", self.eval_size <= self.eval_resize, f"at most --eval-resize, {self.eval_resize}")
        self.check("max_corrupt", 0 <= self.max_corrupt < 1, "in [0, 1)")
        self.check("min_scale", 0 < self.min_scale <= 1, "in (0, 1]")
        self.check("decoded_gib", 0 <= self.decoded_gib < math.inf, "a finite number, at least 0")
        self.check("randaugment", 0 <= self.randaugment <= 30, "in 0 to 30")
        enough = self.workers is None or self.workers >= bool(self.randaugment)
        self.check("workers", enough, "at least 0 (1 with --randaugment)")
        possible = torch.cuda.is_available() and self.crop == "resized" and not self.randaugment
        self.check("decoder", self.decoder == "cpu" or possible, "cpu without a GPU, or for padded crop or RandAugment")

    @property
    def view(self) -> View:
        """How a training view is made."""
        return View(self.train_size, self.crop, self.min_scale, self.randaugment)
