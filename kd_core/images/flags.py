"""The flags of a run or a cache that reads images."""

import dataclasses
import math
from typing import ClassVar, Literal

import torch

from kd_core.cli import Flags, Preset
from kd_core.images.views import MIN_SIZE, View
from kd_core.training.flags import TrainFlags


@dataclasses.dataclass(frozen=True)
class ImageFlags(Flags):
    """Source, views for training and evaluation, and what decodes."""

    GROUP: ClassVar[str] = "data"
    data: str = "digits"
    """Folder <split>/<class>/<image> or a .tar of it, parquet, a hub name, digits (small scans that are at hand), or
    synthetic[:CLASSESxSIDE] (noise)."""
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
    held_out: float = 0.0
    """Share of the training images that is not trained on, the same ones in every run; for methods that choose by them."""
    label_noise: float = 0.0
    """Share of the training images with a wrong label, the same in every run; validation and held-out labels stay."""
    merge_classes: int = 0
    """Learn this many classes, each of those of --data whose numbers have its remainder; 2: even and odd; 0: as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_size", "eval_size", "eval_resize"):
            self.check(name, getattr(self, name) >= MIN_SIZE, f"at least {MIN_SIZE}")
        self.check("eval_size", self.eval_size <= self.eval_resize, f"at most --eval-resize, {self.eval_resize}")
        self.check("max_corrupt", 0 <= self.max_corrupt < 1, "in [0, 1)")
        for name in ("held_out", "label_noise"):
            self.check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self.check("merge_classes", self.merge_classes == 0 or self.merge_classes >= 2, "0, or at least 2")
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


@dataclasses.dataclass(frozen=True)
class TeacherViewFlags(Flags):
    """What teachers see, and what they compute in."""

    GROUP: ClassVar[str] = "teachers"
    teacher_size: int | None = None
    """Side of the teachers' view, pixels; default: each one's own; 0: as the student's."""
    teacher_dtype: Literal["bf16", "fp32"] = "bf16"
    """What the teachers compute in; a cache stores it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("teacher_size", (self.teacher_size or MIN_SIZE) >= MIN_SIZE, f"0, or at least {MIN_SIZE}")


@dataclasses.dataclass(frozen=True)
class ClassifierFlags(TrainFlags, ImageFlags):
    """A classifier trained by SGD, as methods on images share it: by default a small ResNet on images of 32 x 32."""

    GROUP: ClassVar[str] = "model"
    student: str = "resnet8"
    """resnet8 to resnet110 (6n + 2, for 32 x 32), torchvision's resnet18 to resnet152 and wide ones, these also with
    torchvision's weights (resnet50:IMAGENET1K_V2), or a run folder."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """Added to the gradient of matrices and filters."""
    # He et al. 2015, section 4.2, for a few epochs of CIFAR on a CPU.
    train_size: int = 32
    eval_resize: int = 32
    eval_size: int = 32
    crop: Literal["resized", "padded"] = "padded"
    steps: int = 2000
    global_batch_size: int = 128
    micro_batch_size: int = 64
    lr: float = 0.2
    eval_every: int = 500
    deepspeed_config: str = "zero0_fp32_cpu.json"

    PRESETS: ClassVar[dict[str, Preset]] = {
        # torchvision's reference for ResNets: 90 epochs of ImageNet, batch 256.
        "imagenet": Preset("torchvision's reference: ResNet-18, 90 epochs of ImageNet, batch 256",
            student="resnet18", data="ILSVRC/imagenet-1k", train_size=224, eval_resize=256, eval_size=224, crop="resized",
            steps=450_000, global_batch_size=256, micro_batch_size=32, lr=0.1, weight_decay=1e-4, eval_every=5000,
            save_every=5000, deepspeed_config="zero1_bf16.json",
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("momentum", "weight_decay"):
            self.check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
