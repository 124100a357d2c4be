"""Images in batches: views, order and batches as pure functions of the data, the seed and the step.

    image -> random crop, flip, RandAugment, a function of (seed, epoch, image) -> uint8 batch -> device

With cached teachers the seed is the caches' and epochs repeat a few patterns. So neither ranks nor worker processes change what a step learns from, a resumed run needs its step only, and teacher and
student see the same pixels. Images held decoded are cropped in batches by the rank itself; encoded ones are decoded by
worker processes, a micro-batch each. Normalisation is the models' own, on the device.

Shapes: B images, S the side of a view.
"""

import functools
import io
import itertools
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kd_core.cli import check_flag
from kd_core.images.sources import DAMAGE, Split, decode, say_corrupt
from kd_core.system.hashing import uniforms
from kd_core.text.packing import prefetch

# Progressive resizing as in Mosaic ResNet's recipes: fractions of training, and the multiple of all sizes before the last.
GROW_FROM, GROWN_AT, SIZE_STEP = 0.4, 0.8, 4
MIN_SIZE = 8  # pixels
BATCHES_AHEAD = 2  # per worker
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


def check_flags(flags: Any) -> None:
    """Raises ValueError when what a recipe's or a cache's flags say of data and views is impossible."""
    for name in ("train_size", "eval_size", "eval_resize"):
        check_flag(flags, name, getattr(flags, name) >= MIN_SIZE, f"at least {MIN_SIZE}")
    check_flag(flags, "eval_size", flags.eval_size <= flags.eval_resize, f"at most --eval-resize, {flags.eval_resize}")
    check_flag(flags, "max_corrupt", 0 <= flags.max_corrupt < 1, "in [0, 1)")
    check_flag(flags, "min_scale", 0 < flags.min_scale <= 1, "in (0, 1]")
    check_flag(flags, "decoded_gib", 0 <= flags.decoded_gib < math.inf, "a finite number, at least 0")
    check_flag(flags, "randaugment", 0 <= flags.randaugment <= 30, "in 0 to 30")
    check_flag(flags, "teacher_size", (flags.teacher_size or MIN_SIZE) >= MIN_SIZE, f"0, or at least {MIN_SIZE}")
    possible = torch.cuda.is_available() and flags.crop == "resized" and not flags.randaugment
    check_flag(
        flags, "decoder", flags.decoder == "cpu" or possible, "cpu without a GPU, or for padded crop or RandAugment"
    )


class JpegView(NamedTuple):
    """A view that is decoded and cut on the device."""

    file: torch.Tensor  # uint8 [bytes], a JPEG file in RGB or grey
    box: tuple[int, int, int, int]  # left, top, width, height
    flip: bool


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank feeds to one forward."""

    pixels: torch.Tensor  # uint8 [B, 3, S, S], channels last
    labels: torch.Tensor  # int64 [B]
    sample_ids: torch.Tensor  # int64 [B], numbers of the images in their split
    patterns: torch.Tensor  # int64 [B], of the views: epochs, or what stands for them; 0 in the validation
    counted: torch.Tensor  # bool [B]; False for an image that only fills a batch of the validation
    corrupt: torch.Tensor  # float scalar, images that could not be decoded; in training they were replaced
    jpegs: tuple["JpegView", ...] = ()  # instead of pixels, of which there are then none: what the GPU decodes
    mixing: tuple[float, float, int | None] | None = None  # what `to` mixes with: as `mix`

    @property
    def inputs(self) -> tuple[torch.Tensor]:
        """What a model takes."""
        return (self.pixels,)

    @property
    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What says which images these are, and which views of them."""
        return self.sample_ids, self.patterns

    def mixed(self, mixup: float, cutmix: float, num_classes: int | None) -> "MicroBatch":
        """The same, to be mixed (`mix`) once it is on the device; as it is when both alphas are 0."""
        return replace(self, mixing=(mixup, cutmix, num_classes)) if mixup or cutmix else self

    def to(self, device: torch.device) -> "MicroBatch":
        """With what models take on `device`: decoded, and mixed as asked for, for teacher and student alike."""
        pixels, labels = on_device(self, device), self.labels.to(device, non_blocking=True)
        if self.mixing:
            mixup, cutmix, num_classes = self.mixing
            pixels, labels = mix(pixels, labels, mixup, cutmix, num_classes=num_classes)
        corrupt = self.corrupt.to(device, non_blocking=True)
        return replace(self, pixels=pixels, labels=labels, corrupt=corrupt, jpegs=(), mixing=None)

    def pin_memory(self) -> "MicroBatch":
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            labels=self.labels.pin_memory(),
            sample_ids=self.sample_ids.pin_memory(),
            counted=self.counted.pin_memory(),
            corrupt=self.corrupt.pin_memory(),
        )


@dataclass(frozen=True, eq=False)
class Step:
    """What one rank feeds to one optimizer step."""

    micro_batches: list[MicroBatch]


# --- views ------------------------------------------------------------------------------------------------------------


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


def _stretch(image_HWC: np.ndarray, size: int | tuple[int, int]) -> torch.Tensor:
    """Bilinear with antialiasing; uint8 [3, h, w]."""
    tensor = torch.from_numpy(image_HWC).permute(2, 0, 1)
    return F.resize(tensor, [size] if isinstance(size, int) else list(size), antialias=True)


def training_view(image: Image.Image | np.ndarray, view: View, size: int, numbers: Sequence[float]) -> np.ndarray:
    """The view of one image: uint8 [size, size, 3]. An encoded image is decoded here, no finer than the view needs."""
    if view.crop == "padded":
        whole = image if isinstance(image, np.ndarray) else np.array(image.convert("RGB"))
        if whole.shape[:2] != (view.size, view.size):
            whole = np.ascontiguousarray(_stretch(whole, (view.size, view.size)).permute(1, 2, 0).numpy())
        pixels = shift(whole, *numbers[BOX : BOX + 2])
        if size != view.size:
            pixels = _stretch(pixels, (size, size)).permute(1, 2, 0).numpy()
    else:
        width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        left, top, w, h = resized_box(width, height, numbers[BOX:], view.min_scale)
        if isinstance(image, Image.Image):
            # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size at a fraction of the cost.
            image.draft("RGB", (math.ceil(width * size / w), math.ceil(height * size / h)))
            part = np.array(image.convert("RGB"))
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
        image.convert("RGB").save(file, "jpeg", quality=95)
        data = file.getvalue()
    elif b"\xff\xd9" not in data[-64:]:
        raise ValueError("the JPEG file is cut off")
    box = resized_box(*image.size, numbers[BOX:], view.min_scale)
    return JpegView(torch.frombuffer(bytearray(data), dtype=torch.uint8), box, numbers[FLIP] < 0.5)


def on_device(micro: MicroBatch, device: torch.device) -> torch.Tensor:
    """The pixels of a micro-batch on the device, uint8 [B, 3, S, S]; decodes there what `jpeg_view` made."""
    if not micro.jpegs:
        return micro.pixels.to(device, non_blocking=True)
    from torchvision.io import decode_jpeg  # here, because torchvision announces its removal in favour of TorchCodec

    side, views = list(micro.pixels.shape[2:]), []
    decoded = decode_jpeg([jpeg.file for jpeg in micro.jpegs], mode="RGB", device=device)
    for image, (_, (left, top, width, height), flip) in zip(decoded, micro.jpegs, strict=True):
        view = F.resized_crop(image, top, left, height, width, side, antialias=True)
        views.append(F.horizontal_flip(view) if flip else view)
    return torch.stack(views).contiguous(memory_format=torch.channels_last)


@functools.cache
def _randaugment(magnitude: int) -> v2.RandAugment:
    return v2.RandAugment(num_ops=2, magnitude=magnitude)


def validation_view(image: Image.Image | np.ndarray, resize: int, size: int) -> np.ndarray:
    """The centre [size, size, 3] of the image with its shorter side resized to `resize`, uint8: torchvision's."""
    whole = image if isinstance(image, np.ndarray) else np.array(image.convert("RGB"))
    if min(whole.shape[:2]) == resize == size and whole.shape[0] == whole.shape[1]:
        return whole
    return F.center_crop(_stretch(whole, resize), [size]).permute(1, 2, 0).numpy()


# --- batches ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def image_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order in which an epoch visits the images: a permutation, int64 [images]."""
    return np.random.default_rng([seed, epoch]).permutation(images)


def _read(split: Split, index: int) -> Any:
    if split.pixels is not None:
        return split.pixels[index]
    assert split.encoded is not None
    return decode(split.encoded.read(index))


def training_batch(
    split: Split, view: View, size: int, seed: int, ids_B: np.ndarray, patterns_B: np.ndarray, *, nvjpeg: bool = False
) -> MicroBatch:
    """Views of side `size`, each a function of (seed, pattern, image) alone.

    An image that cannot be decoded is replaced by its successor in the split, named and counted.
    """
    numbers_BK = uniforms(seed, patterns_B, ids_B, view.numbers)
    views: list[Any] = []
    corrupt, ids_B = 0, ids_B.copy()
    for row in range(len(ids_B)):
        while True:
            index = int(ids_B[row])
            try:
                views.append(_view(split, index, view, size, numbers_BK[row].tolist(), nvjpeg))
                break
            except DAMAGE as error:
                assert split.encoded is not None, error
                say_corrupt(split.encoded.name(index), error)
                corrupt += 1
                if corrupt > len(split):
                    raise
                ids_B[row] = (index + 1) % len(split)
                one = slice(row, row + 1)
                numbers_BK[one] = uniforms(seed, patterns_B[one], ids_B[one], view.numbers)
    none_BHWC = np.empty((0, size, size, 3), np.uint8)
    pixels_BHWC, jpegs = (none_BHWC, tuple(views)) if nvjpeg else (np.stack(views), ())
    return _micro_batch(split, pixels_BHWC, ids_B, patterns_B, np.ones(len(ids_B), bool), corrupt, jpegs)


def _view(split: Split, index: int, view: View, size: int, numbers: Sequence[float], nvjpeg: bool) -> Any:
    if nvjpeg:
        assert split.encoded is not None, "images held decoded are not decoded again"
        return jpeg_view(split.encoded.read(index), view, numbers)
    return training_view(_read(split, index), view, size, numbers)


@dataclass(frozen=True, eq=False)
class TrainBatches(Dataset[MicroBatch]):
    """This rank's micro-batches by number, `accum` a step.

    A global batch is the next `global_batch_size` images of the epochs' orders, run through without a break, and rank r has
    its r-th contiguous share.

    Args:
        view_seed: of the views; None: `seed`.
        view_patterns: epoch e has the views of epoch e mod this; None: new views in each epoch.
    """

    split: Split
    view: View
    steps: int
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    nvjpeg: bool = False
    view_seed: int | None = None
    view_patterns: int | None = None

    @property
    def accum(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __getitem__(self, number: int) -> MicroBatch:
        step, micro = divmod(number, self.accum)
        first = step * self.global_batch_size + (self.rank * self.accum + micro) * self.micro_batch_size
        places_B, images = first + np.arange(self.micro_batch_size), len(self.split)
        epochs_B = places_B // images
        ids_B = np.empty_like(places_B)
        for epoch in set(epochs_B.tolist()):
            here = epochs_B == epoch
            ids_B[here] = image_order(self.seed, epoch, images)[places_B[here] % images]
        patterns_B = epochs_B % self.view_patterns if self.view_patterns else epochs_B
        seed = self.seed if self.view_seed is None else self.view_seed
        size = self.view.size_at(step, self.steps)
        return training_batch(self.split, self.view, size, seed, ids_B, patterns_B, nvjpeg=self.nvjpeg)


@dataclass(frozen=True, eq=False)
class ValidationBatches(Dataset[MicroBatch]):
    """This rank's share of the validation images, each once over all ranks.

    Every rank has as many batches of the same shapes, as sharded models need: a rank with an image too few repeats one that
    does not count. Neither does an image that cannot be decoded.
    """

    split: Split
    resize: int
    size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return -(-self._share // self.micro_batch_size)

    @property
    def _share(self) -> int:
        return -(-len(self.split) // self.world_size)

    def __getitem__(self, number: int) -> MicroBatch:
        begin = self.rank * self._share
        ids_B = begin + np.arange(
            number * self.micro_batch_size, min(self._share, (number + 1) * self.micro_batch_size)
        )
        counted_B = ids_B < len(self.split)
        ids_B = np.where(counted_B, ids_B, 0)
        pixels_BHWC, corrupt = np.zeros((len(ids_B), self.size, self.size, 3), np.uint8), 0
        for row, index in enumerate(ids_B.tolist()):
            try:
                pixels_BHWC[row] = validation_view(_read(self.split, index), self.resize, self.size)
            except DAMAGE as error:
                assert self.split.encoded is not None, error
                say_corrupt(self.split.encoded.name(index), error)
                corrupt += int(counted_B[row])
                counted_B[row] = False
        return _micro_batch(self.split, pixels_BHWC, ids_B, np.zeros_like(ids_B), counted_B, corrupt)


def _micro_batch(
    split: Split,
    pixels_BHWC: np.ndarray,
    ids_B: np.ndarray,
    patterns_B: np.ndarray,
    counted_B: np.ndarray,
    corrupt: int,
    jpegs: tuple[JpegView, ...] = (),
) -> MicroBatch:
    return MicroBatch(
        pixels=torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2),
        labels=torch.from_numpy(split.labels[ids_B]),
        sample_ids=torch.from_numpy(ids_B),
        patterns=torch.from_numpy(patterns_B),
        counted=torch.from_numpy(counted_B),
        corrupt=torch.tensor(float(corrupt)),
        jpegs=jpegs,
    )


def mix(
    pixels: torch.Tensor, labels: torch.Tensor, mixup: float, cutmix: float, *, num_classes: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image of a batch mixed with its neighbour, and the shares of its classes, float [B, C]; torch's generator draws.

    Args:
        mixup, cutmix: alpha of MixUp (Zhang et al. 2017) and CutMix (Yun et al. 2019), 0 for none; of both, one is drawn.
            Without either, pixels and labels are returned as they are.
    """
    kinds: list[v2.Transform] = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
    kinds += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
    return v2.RandomChoice(kinds)(pixels.float(), labels) if kinds else (pixels, labels)


def num_workers(asked: int | None, split: Split, randaugment: int = 0) -> int:
    """Processes that decode: `asked`, or none for decoded images without RandAugment, else the rank's share of cores."""
    if asked is not None:
        return asked
    if split.pixels is not None and not randaugment:
        return 0
    ranks_here = torch.cuda.device_count() or int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def _obey_rank_alone(_: int) -> None:
    """In a worker: of signals only its rank's count. One to the whole process group is the rank's to handle, by saving."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(143)

    threading.Thread(target=wait, daemon=True).start()


def load(batches: Dataset[MicroBatch], numbers: Sequence[int], *, workers: int) -> Iterator[MicroBatch]:
    """The micro-batches `numbers` in order, made ahead: by worker processes, or with 0 by a thread of this one."""
    cuda = torch.cuda.is_available()
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=cuda and workers > 0,
        prefetch_factor=BATCHES_AHEAD if workers else None,
        worker_init_fn=_obey_rank_alone,
    )
    return iter(loader) if workers else prefetch(loader, pin_memory=cuda)


def steps(batches: TrainBatches, first: int, *, workers: int) -> Iterator[Step]:
    """The optimizer steps from number `first` on."""
    micros = load(batches, range(first * batches.accum, batches.steps * batches.accum), workers=workers)
    while group := list(itertools.islice(micros, batches.accum)):
        yield Step(group)
