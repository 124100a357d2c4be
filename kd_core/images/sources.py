"""Where images come from: folders, tars, parquet files and hub data sets, with a number for each class.

A source has splits of encoded images. Those that fit into memory are decoded once, into the cache, and memory-mapped: all
ranks and later runs share them. Splits follow from names, as they do for text: train*, val*, validation*, dev*, test*.
Without a validation split the test split serves as one (CIFAR has no other); without either, a hash of the image's path
below the folders that all share takes one image in `VALIDATION_ONE_IN`, the same ones in a folder and in a tar of it.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import struct
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

from kd_core.system.checked import read_json, reading
from kd_core.system.files import HIDDEN, TWICE, Listing, build_once, cache_key, cache_root, files_below, write_json
from kd_core.system.hub import HUB_NAME, require_hub
from kd_core.system.splits import VALIDATION_ONE_IN, named_split
from kd_core.system.terminal import one_line, say

FORMAT = 5  # raise it when the same source would be split, numbered or decoded otherwise
# What Pillow is asked to read, by which suffixes it is found, and suffixes of images that it is not.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF")
IMAGE_SUFFIXES = tuple(
    ".jpg .jpeg .jpe .jfif .png .apng .ppm .pgm .pbm .pnm .pfm .bmp .dib .tif .tiff .webp .gif .jp2 .j2k .jpx .avif".split()
)
TABLE_SUFFIXES = (".parquet", ".pq")
UNREAD_SUFFIXES = tuple(".heic .heif .jxl .tga .psd .exr .hdr .dcm .dng .cr2 .nef .arw .svg".split())
DEEP = 2**16 - 1  # white of 16 bits
PROBED = 64  # images whose headers say whether all are equally large
# What Pillow raises on damaged files of its many formats.
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)
DIGITS = "digits"
SYNTHETIC_TRAIN, SYNTHETIC_VALIDATION = 2048, 512
UNFIT = {"bytes": float("inf")}  # images of several sizes are never held decoded


class Encoded(Protocol):
    """Encoded images by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> bytes: ...


class Files(NamedTuple):
    """Images below a folder, or at byte offsets of a tar."""

    root: str
    names: np.ndarray  # bytes [N], relative paths: one array, which forked workers share
    offsets: np.ndarray | None  # int64 [N, 2], begin and size in the tar `root`

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> bytes:
        if self.offsets is None:
            return Path(self.root, self.name(index)).read_bytes()
        begin, size = map(int, self.offsets[index])
        with open(self.root, "rb") as tar:
            tar.seek(begin)
            return tar.read(size)


class Table(NamedTuple):
    """Images in a column of a `datasets` table, which is memory-mapped."""

    rows: Any
    column: str
    title: str

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.title}, row {index}"

    def read(self, index: int) -> bytes:
        cell = self.rows[index][self.column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise ValueError("the cell is empty")
        if cell["bytes"] is not None:
            return cell["bytes"]
        if not (path := Path(cell["path"])).is_file():  # a device would be read without an end
            raise ValueError(f"{path} is no file")
        return path.read_bytes()


class Subset(NamedTuple):
    """Some images of a source."""

    whole: Encoded
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return self.whole.name(int(self.numbers[index]))

    def read(self, index: int) -> bytes:
        return self.whole.read(int(self.numbers[index]))


class Joined(NamedTuple):
    """The images of one source, then those of another."""

    first: Encoded
    second: Encoded

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def name(self, index: int) -> str:
        return self.first.name(index) if index < len(self.first) else self.second.name(index - len(self.first))

    def read(self, index: int) -> bytes:
        return self.first.read(index) if index < len(self.first) else self.second.read(index - len(self.first))


class Decoded(NamedTuple):
    """Images held decoded, as files: for where they stand beside such that are not."""

    pixels: np.ndarray  # uint8 [N, H, W, 3]

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        height, width = self.pixels.shape[1:3]
        return b"P6 %d %d 255\n" % (width, height) + self.pixels[index].tobytes()


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one split, encoded or decoded."""

    labels: np.ndarray  # int64 [N]
    encoded: Encoded | None = None
    pixels: np.ndarray | None = None  # uint8 [N, H, W, 3]
    parts: np.ndarray | None = None  # int64 [N], which of the classes that a label stands for, where they were merged

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: np.ndarray) -> "Split":
        """The images `rows`; of those held decoded a copy."""
        encoded = None if self.encoded is None else Subset(self.encoded, rows)
        return Split(self.labels[rows], encoded, None if self.pixels is None else self.pixels[rows])

    def joined(self, other: "Split") -> "Split":
        """These images, then those of `other`; a copy of the pixels where both are held decoded in one size."""
        labels = np.concatenate([self.labels, other.labels])
        if self.pixels is not None and other.pixels is not None and self.pixels.shape[1:] == other.pixels.shape[1:]:
            return Split(labels, pixels=np.concatenate([self.pixels, other.pixels]))
        return Split(labels, Joined(self._files(), other._files()))

    def _files(self) -> Encoded:
        if self.encoded is not None:
            return self.encoded
        assert self.pixels is not None
        return Decoded(self.pixels)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A source of images; made by `prepare`."""

    name: str
    fingerprint: str  # of names, sizes and labels: equal fingerprints give equal batches
    classes: tuple[str, ...]
    train: Split
    validation: Split
    held_out: Split | None = None  # training images that are not trained on

    def check_batch(self, global_batch_size: int) -> None:
        """Raises ValueError when there are fewer training images than one global batch."""
        if len(self.train) < global_batch_size:
            raise ValueError(
                f"--data {self.name} has {len(self.train)} training images, fewer than one batch; --global-batch-size "
                f"must be at most that, got {global_batch_size}"
            )


def decode(data: bytes) -> Image.Image:
    """The image, or an animation's first, its header read and its pixels not yet: but for those that EXIF has turned, which
    are turned back. Raises one of DAMAGE."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if "exif" not in image.info or _orientation(image) not in range(2, 9):
        return image
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format if image.format != "JPEG" else None  # whose bytes are other pixels
    return turned


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (*DAMAGE, LookupError, TypeError):  # viewers show an image whose EXIF is damaged
        return None


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, 8 bits a channel. Raises one of DAMAGE.

    What is transparent shows white, as on a page: what lies below is seen by nobody, and often black. Pillow itself cuts greys of
    more than 8 bits off at 255: nearly all of them would be white.
    """
    if is_deep(image):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode == "I" or not 0 <= low <= high <= 1:
            raise ValueError(f"a grey of 32 bits, {low:g} to {high:g}, whose white is unknown; save it in 8 or 16 bits")
        return Image.fromarray(np.round(values * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether it is a grey of 16 bits, which Pillow has in 32 where a format has no less."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


# --- sources ----------------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A source that has been listed."""

    classes: tuple[str, ...]
    splits: dict[str, Split]  # encoded, named as the source names them
    fingerprint: str  # of names, sizes and labels


def prepare(source: str, *, decoded_gib: float, max_corrupt: float, progress: bool = False) -> ImageSet:
    """Opens a source; if its images are equally large and fit, decodes them into the cache.

    Args:
        source: a folder `<split>/<class>/<image>` or `<class>/<image>`; an uncompressed .tar of one; a .parquet file or a
            folder of them, with a column of images and one of labels; a hub name; `digits`, 1,797 scans of 8 x 8 that
            scikit-learn has on board; `synthetic` or `synthetic:CLASSESxSIDE`, noise for measurements.
        decoded_gib: data sets up to this size, in GiB of pixels, are held decoded.
        max_corrupt: share of images that may be corrupt; of data held decoded these are named and left out here.

    Raises:
        FileNotFoundError, ValueError: one line that names the flag and says what to do.
    """
    if source.partition(":")[0] == "synthetic":
        return _synthetic(source)
    if source == DIGITS:
        return _digits()
    key, listing = _find(source)
    folder, limit = cache_root() / f"images-{cache_key(key, FORMAT)}", decoded_gib * 2**30

    @functools.cache  # a large source takes its time
    def opened() -> Opened:
        return _with_validation(listing(), source)

    facts: dict[str, Any] = UNFIT
    if folder.is_dir() or _decoded_bytes(opened(), source) <= limit:
        build_once(folder, lambda new: _decode_all(new, opened(), source, max_corrupt, progress))
        facts = read_json(folder / "facts.json")
    if facts["bytes"] > limit:
        return ImageSet(
            source, opened().fingerprint, opened().classes, opened().splits["train"], opened().splits["validation"]
        )
    check_corrupt(facts["corrupt"], facts["images"], max_corrupt, source)
    with reading(folder, "remove it"):
        train, validation = (
            Split(
                np.load(folder / f"{name}.labels.npy"),
                pixels=np.asarray(np.load(folder / f"{name}.npy", mmap_mode="c")),
            )
            for name in ("train", "validation")
        )
    return ImageSet(source, facts["fingerprint"], tuple(facts["classes"]), train, validation)


def prepare_unlabelled(source: str, *, flag: str, **settings: Any) -> tuple[Split, str]:
    """Images whose labels are not read, and a fingerprint of them: all those below a folder, or another source's for training.

    Args:
        source: a folder of images, laid out as it likes; or as `prepare`, which takes the `settings`.
        flag: that names it.

    Returns:
        the images, labelled -1, and what changes when they do.

    Raises:
        FileNotFoundError, ValueError: as `prepare`.
    """
    path = Path(source).expanduser().absolute()
    listing = files_below(path, _is_image, UNREAD_SUFFIXES) if path.is_dir() else None
    if listing is not None and listing.names:
        listing.check(f"{flag} {source}")
        names = sorted(listing.names)
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
        files = Files(str(path), np.array([os.fsencode(name) for name in names]), None)
        return Split(np.full(len(names), -1), files), digest
    try:
        data = prepare(source, **settings)
    except (ValueError, OSError) as error:
        raise type(error)(str(error).replace("--data", flag)) from error
    return replace(data.train, labels=np.full(len(data.train), -1)), data.fingerprint


def check_corrupt(corrupt: int, images: int, max_corrupt: float, source: str) -> None:
    """Raises ValueError when more than the share `max_corrupt` of the images cannot be decoded."""
    if corrupt > max_corrupt * images:
        raise ValueError(
            f"--data {source}: {corrupt} of {images} images are corrupt, more than --max-corrupt "
            f"{max_corrupt} of them; repair or remove them"
        )


def _find(source: str) -> tuple[str, Callable[[], Opened]]:
    """What identifies the source without reading it, and how to list it."""
    path = Path(source).expanduser().absolute()
    if path.is_file() and path.suffix.lower() == ".tar":
        return _identity([path]), lambda: _list_tar(path, source)
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        return _identity([path]), lambda: _list_parquet({"train": [path]}, source)
    if path.is_dir():
        listing = files_below(
            path, lambda name: name.lower().endswith(IMAGE_SUFFIXES + TABLE_SUFFIXES), UNREAD_SUFFIXES
        )
        listing.check(f"--data {source}")
        tables = [path / name for name in listing.names if not _is_image(name)]
        if tables:
            if len(tables) < len(listing.names):
                raise ValueError(f"--data {source} holds both images and tables ({tables[0]}); keep one kind there")
            by_split: dict[str, list[Path]] = {}
            for table in tables:
                names = [table.name, *reversed(table.relative_to(path).parent.parts)]
                split = next((split for name in names if (split := named_split(name))), "train")
                by_split.setdefault(split, []).append(table)
            return _identity(tables), lambda: _list_parquet(by_split, source)
        opened, changed_ns = _list_folder(path, listing, source)
        return f"{opened.fingerprint} {path} {changed_ns}", lambda: opened
    if path.exists():
        raise ValueError(f"--data {source}: give a folder, an uncompressed .tar, .parquet, or a hub name")
    if HUB_NAME.fullmatch(source) and not path.parent.is_dir():
        return f"hub:{source}", lambda: _list_hub(source)
    raise FileNotFoundError(
        f"--data {source}: no such file or folder; give a path, a hub name (owner/name), digits, or synthetic"
    )


def _identity(paths: Sequence[Path]) -> str:
    return json.dumps([(str(path), stat.st_size, stat.st_mtime_ns) for path in paths for stat in [path.stat()]])


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _list_folder(root: Path, listing: Listing, source: str) -> tuple[Opened, int]:
    """The folder's images, and when the newest of them was written."""
    found, changed_ns = [], 0
    for name in listing.names:
        path = os.path.join(root, name)
        try:
            stat = os.stat(path)
        except OSError:  # a link to nothing; as an image that cannot be read it is named and counted
            stat = os.lstat(path)
        changed_ns = max(changed_ns, stat.st_mtime_ns)
        found.append((name, stat.st_size, 0))
    return _layout(str(root), sorted(found), source, listing, in_tar=False), changed_ns


def _list_tar(path: Path, source: str) -> Opened:
    """Lists a tar once, into the cache: a large one has millions of headers."""

    def build(new: Path) -> None:
        try:
            with tarfile.open(path, "r:") as tar:
                members = tar.getmembers()
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"--data {source} is no uncompressed tar ({one_line(error)}); unpack it") from error
        places = {os.path.normpath(m.name): (m.size, m.offset_data, False) for m in members if m.isfile()}
        for m in members:
            if m.islnk() or m.issym():
                target = os.path.normpath(m.linkname if m.islnk() else f"{m.name}/../{m.linkname}")
                size, begin, _ = places.get(target, (0, 0, False))
                places[os.path.normpath(m.name)] = (size, begin, m.issym() and target in places)
        index = {"members": [(name, *place) for name, place in places.items()]}
        (new / "index.json").write_text(json.dumps(index))

    folder = cache_root() / f"tar-{cache_key(_identity([path]), FORMAT)}"
    build_once(folder, build)
    members: dict[str, tuple[Any, ...]] = {}
    listing = Listing(_is_image, UNREAD_SUFFIXES)
    for name, size, begin, twice in read_json(folder / "index.json")["members"]:
        members[name] = (name, size, begin)
        if twice or any(part.startswith(".") for part in name.split("/")):
            listing.leave(name, TWICE if twice else HIDDEN)
        else:
            listing.add(name)
    listing.check(f"--data {source}")
    return _layout(str(path), sorted(members[name] for name in listing.names), source, listing, in_tar=True)


def _layout(root: str, found: list[tuple[Any, ...]], source: str, listing: Listing, *, in_tar: bool) -> Opened:
    """Splits and classes of `(relative path, size, offset)`.

    A split is the topmost folder that is named as one and holds folders. A class is the first folder below it, as
    torchvision's ImageFolder has it; without splits the first below the folders that all images share.
    """
    folders = [os.path.dirname(name) for name, _, _ in found]
    parts = {folder: Path(folder).parts for folder in folders}
    levels = zip(*parts.values(), strict=False)
    shared = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
    below = {folder: names[len(shared) :] for folder, names in parts.items()}
    placed = {folder: place for folder, names in below.items() if (place := _split_and_class(names))}
    if not placed:
        split = next(filter(None, map(named_split, reversed(shared))), "train")
        placed = {folder: (split, names[0]) for folder, names in below.items() if names}
    used = _used({split for split, _ in placed.values()} or {"train"}, source)
    classes = sorted({name for split, name in placed.values() if split in used})
    spelt: dict[str, str] = {}
    for name in classes:  # as disks of other systems write accents
        if (other := spelt.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise ValueError(
                f"--data {source} has a class in two spellings of Unicode, {other!a} and {name!a}; merge them"
            )
    if len(classes) < 2 or all(map(named_split, classes)):
        raise ValueError(
            f"--data {source} holds {len(found)} images in {len(classes)} class folders, {listing}; expected "
            "train/<class>/<image> and val/<class>/<image>, or <class>/<image>"
        )
    outside = [(name, folder) for (name, *_), folder in zip(found, folders, strict=True) if folder not in placed]
    for name, folder in outside:
        if "test" not in map(named_split, below[folder]):
            raise ValueError(f"--data {source}: {name} lies in no class folder; move it into one, or remove it")
    if outside and os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"--data {source}: {len(outside)} test images lie in no class folder and are left out")
    number = {name: index for index, name in enumerate(classes)}
    digest = hashlib.sha256(json.dumps([[name, size] for name, size, _ in found]).encode()).hexdigest()[:16]
    splits = {}
    for split in used:
        rows = [row for row, folder in enumerate(folders) if folder in placed and placed[folder][0] == split]
        offsets = np.array([found[row][:0:-1] for row in rows], np.int64) if in_tar else None
        names = np.array([os.fsencode(found[row][0]) for row in rows])
        splits[split] = Split(np.array([number[placed[folders[row]][1]] for row in rows]), Files(root, names, offsets))
    return Opened(tuple(classes), splits, digest)


def _split_and_class(parts: Sequence[str]) -> tuple[str, str] | None:
    return next(((split, name) for part, name in itertools.pairwise(parts) if (split := named_split(part))), None)


def _used(splits: Collection[str], source: str) -> list[str]:
    """Of the splits of a source the one to train on and, unless it is to be made, the one to validate on."""
    if "train" not in splits:
        raise ValueError(f"--data {source} has only the splits {sorted(splits)}; add a folder or file named train")
    return ["train", *[name for name in ("validation", "test") if name in splits][:1]]


def _list_parquet(by_split: dict[str, list[Path]], source: str) -> Opened:
    import datasets

    files = {split: [str(path) for path in by_split[split]] for split in _used(by_split, source)}
    identity = [[split, Path(path).name, os.stat(path).st_size] for split in sorted(files) for path in files[split]]
    try:
        tables = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache_root() / "arrow"))
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"--data {source} cannot be read as parquet ({one_line(error)})") from error
    return _tables(tables, source, json.dumps(identity))


def _list_hub(source: str) -> Opened:
    import datasets

    require_hub(f"--data {source} is no local path, and the data set of that name")
    name, _, config = source.partition(":")
    try:
        tables = datasets.load_dataset(name, config or None)
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {source} cannot be loaded from the hub ({one_line(error)})") from error
    return _tables(tables, source, json.dumps([source, [[split, len(rows)] for split, rows in tables.items()]]))


def _tables(tables: Any, source: str, identity: str) -> Opened:
    """Splits of a `datasets.DatasetDict` with one column of images and one of labels."""
    import datasets

    splits: dict[str, Split] = {}
    features = next(iter(tables.values())).features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), "image")
    label = next((name for name in ("label", "labels", "fine_label") if name in features), None)
    if image not in features or label is None:
        raise ValueError(f"--data {source} has the columns {list(features)}; expected image and label")
    kind = getattr(features[label], "dtype", "a structure")
    if not re.fullmatch(r"u?int\d+", kind):
        raise ValueError(f"--data {source}: the column {label} is {kind}; expected numbers of classes")
    names = getattr(features[label], "names", None)
    by_split = {named_split(title) or title: rows for title, rows in tables.items()}
    most = len(by_split["train"]) if "train" in by_split else 0  # of classes without names, each with an image
    for split in _used(by_split, source):
        rows = by_split[split].select_columns([label]).with_format("arrow")[:][label]
        labels = rows.cast("int64", safe=False).fill_null(-1).to_numpy()  # what is beyond becomes negative
        wrong = np.flatnonzero((labels < 0) | (labels >= (len(names) if names else most)))
        if len(wrong):
            allowed = (
                f"in 0 to {len(names) - 1}" if names else f"at least 0 and below the number of training images, {most}"
            )
            raise ValueError(
                f"--data {source}: labels must be {allowed}, got {rows[wrong[0]]} in {split}, row {wrong[0]}"
            )
        images = by_split[split].select_columns([image]).cast_column(image, datasets.Image(decode=False))
        splits[split] = Split(labels, Table(images, image, split))
    count = max(int(split.labels.max(initial=0)) for split in splits.values()) + 1
    classes = names or [str(number) for number in range(count)]
    digest = hashlib.sha256(identity.encode() + b"".join(split.labels.tobytes() for split in splits.values()))
    return Opened(tuple(classes), splits, digest.hexdigest()[:16])


def _with_validation(opened: Opened, source: str) -> Opened:
    """The splits "train" and "validation" of a source."""
    train, *rest = (opened.splits[name] for name in _used(opened.splits, source))
    if not rest:
        assert train.encoded is not None
        names = [train.encoded.name(index) for index in range(len(train))]
        shared = os.path.commonpath(names)  # which a tar made one folder higher adds
        digests = (hashlib.sha256(os.fsencode(os.path.relpath(name, shared))).digest() for name in names)
        chosen = np.array([int.from_bytes(digest[:8], "little") % VALIDATION_ONE_IN == 0 for digest in digests])
        *rest, train = (train.part(np.flatnonzero(rows)) for rows in (chosen, ~chosen))
    if not len(rest[0]) or not len(train):
        raise ValueError(
            f"--data {source} has too few images to keep one in {VALIDATION_ONE_IN} for validation; add val/"
        )
    untaught = [opened.classes[number] for number in np.setdiff1d(rest[0].labels, train.labels)]
    if untaught:
        raise ValueError(
            f"--data {source} has validation images but no training image of {len(untaught)} class(es), "
            f"{', '.join(untaught[:5])}; name classes alike in both splits, or remove those images"
        )
    return opened._replace(splits={"train": train, "validation": rest[0]})


# --- decoded data -----------------------------------------------------------------------------------------------------


def _first_size(opened: Opened, name: str, source: str) -> tuple[int, int] | None:
    """Width and height of the first images of a split, if all are alike. Raises ValueError when no image can be decoded."""
    encoded = opened.splits[name].encoded
    sizes: set[tuple[int, int]] = set()
    brightest = 0
    assert encoded is not None
    for index in range(len(encoded)):
        if index >= PROBED and sizes:
            break
        with contextlib.suppress(*DAMAGE):
            image = decode(encoded.read(index))
            if not sizes:
                image.load()  # of the others the headers will do
            if is_deep(image):
                brightest = max(brightest, int(np.asarray(image).max()))
            sizes.add(image.size)
    if not sizes:
        raise ValueError(_all_damaged(source, name))
    if 0 < brightest <= DEEP // 16:
        raise ValueError(
            f"--data {source}: greys of 16 bits, of which the first images use only 0 to {brightest} of {DEEP}, would be black in "
            "8 bits; stretch them, or save them in 8 bits"
        )
    return sizes.pop() if len(sizes) == 1 else None


def _all_damaged(source: str, split: str) -> str:
    return f"--data {source}: no image of the {split} split can be decoded; repair them"


def _decoded_bytes(opened: Opened, source: str) -> float:
    """Bytes of all pixels, judging by the first images; infinite if these differ in size."""
    sizes = {_first_size(opened, name, source) for name in opened.splits}
    size = sizes.pop()
    if sizes or size is None:
        return float("inf")
    return float(sum(len(split) for split in opened.splits.values()) * size[0] * size[1] * 3)


def _decode_all(folder: Path, opened: Opened, source: str, max_corrupt: float, progress: bool) -> None:
    """Writes `<split>.npy` and `<split>.labels.npy`, without corrupt images; only a note if sizes differ after all."""
    images = sum(len(split) for split in opened.splits.values())
    if progress:
        say(f"decoding {images} images of {source}, once")
    digest, corrupt, size = hashlib.sha256(), 0, _first_size(opened, "train", source)
    assert size is not None
    for name, split in opened.splits.items():
        assert split.encoded is not None
        part, shape = folder / f"{name}.npy.part", (len(split), size[1], size[0], 3)
        pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        with part.open("r+b") as file:  # on a full disk a write into the map would be a SIGBUS
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        kept: list[int] = []
        for index in range(len(split)):
            try:
                image = rgb(decode(split.encoded.read(index)))
            except DAMAGE as error:
                corrupt += 1
                say_corrupt(split.encoded.name(index), error)
                check_corrupt(corrupt, images, max_corrupt, source)
                continue
            if image.size != size:
                part.unlink()
                return write_json(folder / "facts.json", UNFIT)
            pixels[len(kept)] = image
            kept.append(index)
        if not kept:
            raise ValueError(_all_damaged(source, name))
        labels = split.labels[kept]
        np.save(folder / f"{name}.npy", pixels[: len(kept)])
        np.save(folder / f"{name}.labels.npy", labels)
        part.unlink()
        digest.update(pixels[: len(kept)].tobytes() + labels.tobytes())
    facts = {"bytes": images * size[0] * size[1] * 3, "images": images, "corrupt": corrupt}
    write_json(folder / "facts.json", facts | {"classes": opened.classes, "fingerprint": digest.hexdigest()[:16]})


def say_corrupt(name: str, error: BaseException) -> None:
    say(f"corrupt image left out: {name} ({one_line(error)})")


def _digits() -> ImageSet:
    """The test set of Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits"; every fifth scan validates."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    grey = np.round(scans.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    held_out = np.arange(len(labels)) % 5 == 4

    def split(rows: np.ndarray) -> Split:
        return Split(labels[rows].astype(np.int64), pixels=grey[rows].repeat(3, axis=3))

    return ImageSet(DIGITS, DIGITS, tuple(map(str, range(10))), split(~held_out), split(held_out))


def _synthetic(source: str) -> ImageSet:
    """Noise around a random pattern for each class: a source for measurements and smoke tests, not for science."""
    match = re.fullmatch(r"synthetic(?::(\d+)x(\d+))?", source)
    if match is None or (match[1] and (int(match[1]) < 2 or int(match[2]) < 8)):
        raise ValueError(f"--data {source}: expected synthetic or synthetic:CLASSESxSIDE, such as synthetic:1000x224")
    classes, side = int(match[1] or 10), int(match[2] or 32)
    generator = np.random.default_rng(0)
    patterns = (
        generator.integers(64, 192, (classes, 4, 4, 3), np.uint8).repeat(-(-side // 4), 1).repeat(-(-side // 4), 2)
    )

    def split(count: int) -> Split:
        labels = np.arange(count) % classes
        pixels = generator.integers(0, 64, (count, side, side, 3), np.uint8)
        return Split(labels, pixels=pixels + patterns[labels, :side, :side])

    return ImageSet(
        source, source, tuple(map(str, range(classes))), split(SYNTHETIC_TRAIN), split(SYNTHETIC_VALIDATION)
    )
