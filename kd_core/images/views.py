"""Views of one image: what training and evaluation see of it, as pure functions of numbers in [0, 1).

Shapes: B images, S the side of a view.
"""

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import one_hot
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kd_core.images.sources import decode, rgb

# Progressive resizing as in Mosaic ResNet's recipes: fractions of training, and the multiple of all sizes before the last.
GROW_FROM, GROWN_AT, SIZE_STEP = 0.4, 0.8, 4
MIN_SIZE = 8  # pixels
# Of torchvision's RandomResizedCrop.
RATIOS, ATTEMPTS = (3 / 4, 4 / 3), 10
# Columns of the random numbers of a view.
FLIP, AUGMENT, BOX = 0, 1, 2


@dataclass(frozen=True)
class View:
    """How a training view is made.

    Args:
        size: S at the end of training, pixels.
        crop: "resized": a random part of the image, of at least `min_scale` of its area, stretched to S x S
            (Szegedy et al. 2015); "padded": a shift by up to an eighth of the side, black outside (He et al. 2015).
        randaugment: magnitude of RandAugment's two operations in 0 to 30 (Cubuk et al. 2019), 0 for none.
        initial_scale: progressive resizing, Composer's: `initial_scale * size` for the first GROW_FROM of training, then
            growing linearly, and `size` from GROWN_AT on.
    """

    size: int
    crop: str = "resized"
    min_scale: float = 0.08
    randaugment: int = 0
    initial_scale: float = 1.0

    @property
    def numbers(self) -> int:
        """How many random numbers make a view."""
        return BOX + (2 if self.crop == "padded" else 4 * ATTEMPTS)

    def size_at(self, step: int, steps: int) -> int:
        """S of a step, a multiple of SIZE_STEP until it has grown to `size`."""
        grown = (step / steps - GROW_FROM) / (GROWN_AT - GROW_FROM)
        scale = self.initial_scale + (1 - self.initial_scale) * min(1.0, max(0.0, grown))
        size = max(MIN_SIZE, round(self.size * scale / SIZE_STEP) * SIZE_STEP)
        return self.size if scale >= 1 else min(self.size, size)


class JpegView(NamedTuple):
    """A view that is decoded and cut on the device."""

    file: torch.Tensor  # uint8 [bytes], a JPEG file in RGB or grey
    box: tuple[int, int, int, int]  # left, top, width, height
    flip: bool


def resized_box(width: int, height: int, numbers: Sequence[float], min_scale: float) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part, as torchvision's RandomResizedCrop draws it.

    Args:
        numbers: in [0, 1), 4 for each of ATTEMPTS attempts: area, aspect ratio, left, top.
    """
    for area, ratio, left, top in zip(*(numbers[column::4] for column in range(4)), strict=True):
        target = width * height * (min_scale + (1 - min_scale) * area)
        aspect = math.exp(math.log(RATIOS[0]) + ratio * (math.log(RATIOS[1]) - math.log(RATIOS[0])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(left * (width - w + 1)), int(top * (height - h + 1)), w, h
    w, h = min(width, round(height * RATIOS[1])), min(height, round(width / RATIOS[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def shift(image_HWC: np.ndarray, down: float, right: float) -> np.ndarray:
    """The image moved by up to an eighth of its sides, black outside; `down` and `right` are in [0, 1), 1/2 the middle."""
    h, w, _ = image_HWC.shape
    dy, dx = int(down * (2 * (h // 8) + 1)) - h // 8, int(right * (2 * (w // 8) + 1)) - w // 8
    out = np.zeros_like(image_HWC)
    out[max(0, dy) : h + dy, max(0, dx) : w + dx] = image_HWC[max(0, -dy) : h - dy, max(0, -dx) : w - dx]
    return out


def _stretch(images_HWC: np.ndarray, size: int | tuple[int, int]) -> torch.Tensor:
    """Bilinear with antialiasing; of uint8 [..., H, W, 3], uint8 [..., 3, h, w]."""
    tensor = torch.from_numpy(images_HWC).movedim(-1, -3)
    return F.resize(tensor, [size] if isinstance(size, int) else list(size), antialias=True)


def uncropped(images_HWC: np.ndarray, view: View) -> np.ndarray:
    """What a padded crop begins with, the same in every epoch: images uint8 [..., H, W, 3] at the view's final side."""
    if images_HWC.shape[-3:-1] == (view.size, view.size):
        return images_HWC
    return np.ascontiguousarray(_stretch(images_HWC, (view.size, view.size)).movedim(-3, -1).numpy())


def training_view(image: Image.Image | np.ndarray, view: View, size: int, numbers: Sequence[float]) -> np.ndarray:
    """The view of one image: uint8 [size, size, 3]. An encoded image is decoded here, no finer than the view needs."""
    if view.crop == "padded":
        whole = image if isinstance(image, np.ndarray) else np.array(rgb(image))
        pixels = shift(uncropped(whole, view), *numbers[BOX : BOX + 2])
        if size != view.size:
            pixels = _stretch(pixels, (size, size)).permute(1, 2, 0).numpy()
    else:
        width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        left, top, w, h = resized_box(width, height, numbers[BOX:], view.min_scale)
        if isinstance(image, Image.Image):
            # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size at a fraction of the cost.
            image.draft("RGB", (math.ceil(width * size / w), math.ceil(height * size / h)))
            part = np.array(rgb(image))
            scale_x, scale_y = part.shape[1] / width, part.shape[0] / height
            left, w = round(left * scale_x), max(1, round(w * scale_x))
            top, h = round(top * scale_y), max(1, round(h * scale_y))
        else:
            part = image
        pixels = _stretch(part[top : top + h, left : left + w], (size, size)).permute(1, 2, 0).numpy()
    if numbers[FLIP] < 0.5:  # whole pixels are moved, several times as fast as their bytes
        pixels = np.ascontiguousarray(pixels).view("V3")[:, ::-1].copy().view(np.uint8)
    if view.randaugment:
        torch.manual_seed(int(numbers[AUGMENT] * 2**53))  # of a worker process, where nothing else draws
        operations = _randaugment(view.randaugment)
        pixels = operations(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    return pixels


def jpeg_view(data: bytes, view: View, numbers: Sequence[float]) -> JpegView:
    """The view of one image, for `on_device` to make; images in other formats are encoded again. Raises one of DAMAGE."""
    image = decode(data)
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        file = io.BytesIO()
        rgb(image).save(file, "jpeg", quality=95)
        data = file.getvalue()
    elif b"\xff\xd9" not in data[-64:]:
        raise ValueError("the JPEG file is cut off")
    box = resized_box(*image.size, numbers[BOX:], view.min_scale)
    return JpegView(torch.frombuffer(bytearray(data), dtype=torch.uint8), box, numbers[FLIP] < 0.5)


@functools.cache
def _randaugment(magnitude: int) -> v2.RandAugment:
    return v2.RandAugment(num_ops=2, magnitude=magnitude)


def validation_view(image: Image.Image | np.ndarray, resize: int, size: int) -> np.ndarray:
    """The centre [size, size, 3] of the image with its shorter side resized to `resize`, uint8: torchvision's."""
    whole = image if isinstance(image, np.ndarray) else np.array(rgb(image))
    if min(whole.shape[:2]) == resize == size and whole.shape[0] == whole.shape[1]:
        return whole
    return F.center_crop(_stretch(whole, resize), [size]).permute(1, 2, 0).numpy()


def mix(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    mixup: float,
    cutmix: float,
    *,
    num_classes: int | None,
    share: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image of a batch mixed with its neighbour, and the shares of its classes, float [B, C]; torch's generator draws.

    Args:
        mixup, cutmix: alpha of MixUp (Zhang et al. 2017) and CutMix (Yun et al. 2019), 0 for none; of both, one is drawn.
            Without either, pixels and labels are returned as they are.
        share: None: all images of a batch are mixed by one draw. Else MixUp alone: this share of them, each by its own draw,
            and the others stay (partial mixup, arXiv 2211.03946); 0 returns pixels and labels as they are.
    """
    if share is not None:
        return _mix_some(pixels, labels, mixup, share, num_classes) if mixup and share else (pixels, labels)
    kinds: list[v2.Transform] = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
    kinds += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
    return v2.RandomChoice(kinds)(pixels.float(), labels) if kinds else (pixels, labels)


def _mix_some(
    pixels: torch.Tensor, labels: torch.Tensor, mixup: float, share: float, num_classes: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    drawn_B = torch.distributions.Beta(mixup, mixup).sample((len(labels),))
    own_B = drawn_B.where(torch.rand(len(labels)) < share, 1.0).to(pixels.device)

    def mixed(values: torch.Tensor) -> torch.Tensor:
        own = own_B.view(-1, *[1] * (values.ndim - 1))
        return own * values + (1 - own) * values.roll(1, 0)

    return mixed(pixels.float()), mixed(one_hot(labels, num_classes or -1).float())
