"""Images in batches: views, order and batches as pure functions of the data, the seed and the step.

    image -> random crop, flip, RandAugment, a function of (seed, epoch, image) -> uint8 batch -> device

With cached teachers the seed is the caches' and epochs repeat a few patterns. So neither ranks nor worker processes change
what a step learns from, a resumed run needs its step only, and teacher and student see the same pixels. Images held decoded
are cropped in batches by the rank itself; encoded ones are decoded by worker processes, a micro-batch each. Normalisation
is the models' own, on the device.

Shapes: B images, S the side of a view.
"""

import contextlib
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from kd_core.images import altered
from kd_core.images.flags import ImageFlags
from kd_core.images.sources import DAMAGE, ImageSet, Split, decode, prepare, say_corrupt
from kd_core.images.views import JpegView, View, jpeg_view, mix, training_view, uncropped, validation_view
from kd_core.system.ahead import prefetch
from kd_core.system.hashing import uniforms
from kd_core.system.ranks import local_rank, rank, world_size
from kd_core.system.terminal import say
from kd_core.training import loop
from kd_core.training.loop import Run

BATCHES_AHEAD = 2  # per worker
RESIZED_AT_ONCE = 1000


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
    mixing: Mapping[str, Any] | None = None  # what `to` mixes by: as `mix`

    @property
    def inputs(self) -> tuple[torch.Tensor]:
        """What a model takes."""
        return (self.pixels,)

    @property
    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What says which images these are, and which views of them."""
        return self.sample_ids, self.patterns

    def mixed(
        self, mixup: float, cutmix: float, num_classes: int | None, *, share: float | None = None
    ) -> "MicroBatch":
        """The same, to be mixed (`mix`) once it is on the device."""
        return replace(self, mixing=dict(mixup=mixup, cutmix=cutmix, num_classes=num_classes, share=share))

    def to(self, device: torch.device) -> "MicroBatch":
        """With what models take on `device`: decoded, and mixed as asked for, for teacher and student alike."""
        pixels, labels = on_device(self, device), self.labels.to(device, non_blocking=True)
        if self.mixing:
            with _drawn_for(*self.keys):
                pixels, labels = mix(pixels, labels, **self.mixing)
        return replace(self, pixels=pixels, labels=labels, jpegs=(), mixing=None)

    def pin_memory(self) -> "MicroBatch":
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            labels=self.labels.pin_memory(),
            sample_ids=self.sample_ids.pin_memory(),
            counted=self.counted.pin_memory(),
        )


@contextlib.contextmanager
def _drawn_for(*keys_B: torch.Tensor) -> Iterator[None]:
    """Has torch's generator on the CPU draw as these images and views say, whichever rank has them, and then go on as before."""
    digest = hashlib.blake2b(b"".join(keys.numpy().tobytes() for keys in keys_B), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
        yield


@dataclass(frozen=True, eq=False)
class Step:
    """What one rank feeds to one optimizer step; the step says where the data stands."""

    micro_batches: list[MicroBatch]
    total_rows: int  # images over all ranks
    check: Callable[[loop.Step], None] = lambda _: None  # called after the step

    @property
    def counts(self) -> dict[str, float]:
        """For the log."""
        return {"corrupt_images": sum(float(micro.corrupt) for micro in self.micro_batches)}


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


def smaller(split: Split, view: View) -> Split:
    """Images held decoded, resized once where each padded crop would make them smaller again; others as they are."""
    if view.crop != "padded" or split.pixels is None or view.size**2 >= math.prod(split.pixels.shape[1:3]):
        return split
    parts = range(0, len(split), RESIZED_AT_ONCE)
    return replace(
        split, pixels=np.concatenate([uncropped(split.pixels[at : at + RESIZED_AT_ONCE], view) for at in parts])
    )


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
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(143)

    threading.Thread(target=wait, daemon=True).start()


@dataclass(frozen=True, eq=False)
class Sent(Dataset[Any]):
    """What workers make, in shared memory while that has room for all of theirs, else as bytes that go through a pipe.

    Without room PyTorch's worker would fail in a thread, and its rank wait for ever.
    """

    batches: Dataset[MicroBatch]
    at_once: int  # batches that may be on their way on this machine

    def __getitem__(self, number: int) -> MicroBatch | bytes:
        micro = self.batches[number]
        return micro if micro.pixels.nbytes * self.at_once < shared_memory_left() else pickle.dumps(micro)


def shared_memory_left() -> int:
    """Bytes; 0 without any. Docker gives 64 MiB unless --shm-size says otherwise."""
    try:
        there = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return there.f_bavail * there.f_frsize


@functools.cache
def can_have_workers() -> bool:
    """Whether processes can be made that wait for one another; where not, says so."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        say(f"/dev/shm cannot be used ({error.strerror}): images are decoded without --workers, which is slower")
        return False
    return True


def load(batches: Dataset[MicroBatch], numbers: Sequence[int], *, workers: int) -> Iterator[MicroBatch]:
    """The micro-batches `numbers` in order, made ahead: by worker processes, or with 0 by a thread of this one."""
    cuda = torch.cuda.is_available()
    if not workers or not can_have_workers():
        return prefetch(DataLoader(batches, batch_size=None, sampler=numbers), pin_memory=cuda)
    loader = DataLoader(
        Sent(batches, (workers * BATCHES_AHEAD + 1) * int(os.environ.get("LOCAL_SIZE", "1"))),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=cuda,
        prefetch_factor=BATCHES_AHEAD,
        worker_init_fn=_obey_rank_alone,
    )
    return received(loader, pin_memory=cuda)


def received(sent: Iterable[MicroBatch | bytes], *, pin_memory: bool) -> Iterator[MicroBatch]:
    """What workers sent, whichever way; the slower one is said once."""
    told = False
    for one in sent:
        if isinstance(one, bytes):
            if not told and local_rank() == 0:
                say(
                    f"/dev/shm has {shared_memory_left() / 2**20:.0f} MiB left, too little for batches of images: they go "
                    "through pipes, which is slower; give it more (docker run --shm-size=8g), or take fewer --workers"
                )
            told, one = True, pickle.loads(one)
            one = one.pin_memory() if pin_memory else one
        yield one


def steps(batches: TrainBatches, numbers: range, *, workers: int) -> Iterator[Step]:
    """The optimizer steps of these numbers."""
    micros = load(batches, range(numbers.start * batches.accum, numbers.stop * batches.accum), workers=workers)
    while group := list(itertools.islice(micros, batches.accum)):
        yield Step(group, batches.global_batch_size)


def build(cfg: ImageFlags) -> ImageSet:
    """The images of a run, as its flags say; errors as `sources.prepare` and `altered.hold_out`."""
    data = prepare(cfg.data, decoded_gib=cfg.decoded_gib, max_corrupt=cfg.max_corrupt, progress=local_rank() == 0)
    if cfg.held_out:
        data = altered.hold_out(data, cfg.held_out)
    if cfg.label_noise:
        data = altered.with_label_noise(data, cfg.label_noise)
    return altered.merged(data, cfg.merge_classes) if cfg.merge_classes else data


def corrupt_limit(run: Run[Any], images: int) -> Callable[[loop.Step], None]:
    """What stops the run once more of its training images than --max-corrupt of those seen could not be decoded."""
    total = 0

    def check(step: loop.Step) -> None:
        nonlocal total
        cfg, corrupt = run.cfg, int(step.line["corrupt_images"])
        step.log(corrupt_images=corrupt)
        total += corrupt
        if total > cfg.max_corrupt * max(images, (step.number + 1 - run.first) * cfg.global_batch_size):
            raise loop.Stopped("corrupt-images", step=step.number + 1, error=f"{total} images could not be decoded")

    return check


def batches(run: Run[Any], data: ImageSet, part: range | None = None, /, **views: int) -> Iterator[Step]:
    """The run's optimizer steps from where it stands; images that cannot be decoded stop it above --max-corrupt.

    Args:
        part: only those of these numbers, where other steps have other images; None: all.
        views: `view_seed` and `view_patterns` of `TrainBatches`, where caches have their own.

    Raises:
        ValueError: there are fewer images than one batch.
    """
    cfg = run.cfg
    data.check_batch(cfg.global_batch_size)
    made = TrainBatches(
        smaller(data.train, cfg.view), cfg.view, cfg.steps, cfg.seed, cfg.global_batch_size, cfg.micro_batch_size, rank(), world_size(),
        nvjpeg=cfg.decoder == "nvjpeg" and data.train.encoded is not None, **views,
    )  # fmt: skip
    check = corrupt_limit(run, len(data.train))
    part = part or range(cfg.steps)
    ahead = steps(
        made,
        range(max(part.start, run.first), part.stop),
        workers=num_workers(cfg.workers, data.train, cfg.randaugment),
    )
    return (replace(step, check=check) for step in ahead)
