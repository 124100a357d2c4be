"""What readers of folders take, what they leave out and say, and what they refuse: one rule for text, images, tars and GLUE."""

import bz2
import datetime
import gzip
import io
import json
import lzma
import os
import re
import tarfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image

from kd_core.glue import tasks as glue
from kd_core.images import sources
from kd_core.images.sources import prepare, rgb
from kd_core.images.views import View, jpeg_view, training_view, validation_view
from kd_core.system.files import files_below
from kd_core.text import documents
from kd_core.text.tokenizer import load_tokenizer, train_wordpiece
from tests.conftest import photo

TEXT = "one text\n\nanother text\n"


def write(root: Path, *names: str, content: str | bytes = TEXT) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


# --------------------------------------------------------------------------------------------------------------- links


def test_links_are_followed_once_by_device_and_inode(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "b/1.txt", "b/2.txt")
    store = write(tmp_path / "store", "3.txt", "deep/4.txt")
    (data / "a").symlink_to("b")  # before the folder itself by name
    (data / "0.txt").symlink_to("b/1.txt")
    (data / "c").symlink_to(store)
    (data / "d").symlink_to(store)
    (store / "deep" / "up").symlink_to(data)
    (store / "deep" / "same.txt").symlink_to("4.txt")
    (data / "e.txt").symlink_to(store / "3.txt")
    (data / "gone.txt").symlink_to("nowhere")
    (data / "self.txt").symlink_to("self.txt")
    os.link(data / "b" / "2.txt", data / "hard.txt")
    os.mkfifo(data / "pipe.txt")
    listing = files_below(data)
    assert listing.names == ["b/1.txt", "b/2.txt", "c/3.txt", "c/deep/4.txt", "gone.txt", "hard.txt", "self.txt"]
    assert listing.left_out["no regular files"] == ["pipe.txt"]
    twice = sorted(listing.left_out["taken already by another name"])
    assert twice == ["0.txt", "a", "c/deep/same.txt", "c/deep/up", "d", "e.txt"]
    with pytest.raises(ValueError, match=r"gone.txt cannot be read \(No such file or directory\)"):
        documents.local_documents(data)


def test_a_folder_of_links_alone_is_read(tmp_path: Path) -> None:
    """As git-annex and link farms have it; two names of one file are one."""
    store = write(tmp_path / ".store", "x1", "x2")
    (tmp_path / "data").mkdir()
    for name, target in (("a.txt", "x1"), ("b.txt", "x2"), ("c.txt", "x1")):
        (tmp_path / "data" / name).symlink_to(store / target)
    assert files_below(tmp_path / "data").names == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "no mark".encode("utf-16-le"), "a.txt is not UTF-8 text at byte 1 (line 1), which is NUL"),
        ("a.txt", b"whole\n\n" + b"\0" * 4096, "a.txt is not UTF-8 text at byte 7 (line 3), which is NUL"),
        ("a.txt", "a mark".encode("utf-16"), "a.txt is not UTF-8 text at byte 0"),
        ("a.jsonl", b'{"text": "x"}\n' + b"\0" * 512, "a.jsonl"),
        (
            "a.txt.gz",
            gzip.compress(bytes(range(97, 120)) * 99, mtime=0)[:-9],
            "a.txt.gz cannot be read (Compressed file ended",
        ),
    ],
)
def test_bytes_that_are_no_text(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        list(documents.read_file(tmp_path / name))
    assert "\n" not in str(error.value)


def test_what_cannot_be_listed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "closed/b.txt")
    scandir: Callable[[str], Any] = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = files_below(tmp_path)
    assert (listing.names, str(listing)) == (["a.txt"], "left out 1 unreadable, Permission denied (closed)")


# ---------------------------------------------------------------------------------------------------------------- text


def test_a_class_in_two_spellings_of_unicode_is_refused(tmp_path: Path) -> None:
    for name in ("caf\u00e9", "cafe\u0301", "tea"):
        write(tmp_path, f"train/{name}/1.jpg", f"val/{name}/1.jpg", content="")
    with pytest.raises(ValueError, match=r"a class in two spellings of Unicode, 'cafe\\u0301' and 'caf\\xe9'; merge"):
        prepare(str(tmp_path), decoded_gib=0, max_corrupt=0)


def test_folders_without_an_end_are_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "/".join("a" * 300)).mkdir(parents=True)
    (tmp_path / "x.txt").touch()
    listing = files_below(tmp_path)
    assert listing.names == ["x.txt"] and "1 more than 200 folders deep (a/a/" in str(listing)


def test_what_is_left_out_is_said_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a.txt", ".b.txt", "notes.md", "x.html", "y.docx", "LICENSE", "run/log.jsonl")
    write(tmp_path, "run/run.json", content='{"recipe": "x", "config": {}}')
    assert [path.name for _, path in documents.find_files(tmp_path)] == ["a.txt"]
    assert capsys.readouterr().err == (
        f"--data {tmp_path}: left out 1 hidden (.b.txt), 4 of other kinds (LICENSE, notes.md, x.html, ...), 1 run folders (run)\n"
    )
    (tmp_path / "a.txt").unlink()
    with pytest.raises(
        ValueError, match=r"no text files in this folder, left out 1 hidden \(.b.txt\), 4 of other kinds"
    ):
        documents.find_files(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["a.TXT", "a.text", "a.Txt.BZ2", "a.txt.lzma", "a.txt.zst", "a.txt.lz4", "a.jsonl.zst", "a.ndjson", "a.JSON.bz2"],
)
def test_every_spelling_and_compression_is_read(name: str, tmp_path: Path) -> None:
    plain = TEXT.encode()
    if "json" in name.lower():
        plain = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXT.strip().split("\n\n"))
    packed = plain
    if name.endswith((".zst", ".lz4")):
        buffer = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(buffer, {".zst": "zstd", ".lz4": "lz4"}[name[-4:]]) as stream:
            stream.write(plain)
        packed = buffer.getvalue().to_pybytes()
    elif name.lower().endswith(".bz2"):
        packed = bz2.compress(plain)
    elif name.endswith(".lzma"):
        packed = lzma.compress(plain, lzma.FORMAT_ALONE)
    write(tmp_path, name, content=packed)
    ((_, path),) = documents.find_files(tmp_path)
    assert [text.strip() for text in documents.read_file(path)] == ["one text", "another text"]
    if packed is not plain:
        path.write_bytes(packed[:-9])
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            list(documents.read_file(path))


@pytest.mark.parametrize(
    "name", ["a.zip", "a.txt.zip", "wiki.gz", "a.tar.gz", "a.TAR", "b.7z", "a.txt.Z", "a.txt.br", "a.arrow"]
)
def test_what_may_hold_text_and_is_not_read_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, "good.txt", f"sub/{name}")
    with pytest.raises(
        ValueError, match=rf"--data {tmp_path} has sub/{name} packed or of a kind that nothing here reads"
    ):
        documents.local_documents(tmp_path)


def test_a_text_and_its_compressed_form_are_one_text(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "a.txt.gz")
    with pytest.raises(ValueError, match=r"holds the same text twice, a\.txt and a\.txt\.gz; keep one of them"):
        documents.local_documents(tmp_path)


# -------------------------------------------------------------------------------------------------------------- images


def image_folder(root: Path, suffix: str = ".jpg", images: int = 3) -> Path:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            write(root, *(f"{split}/{label}/{number}{suffix}" for number in range(images)), content=photo(0))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("suffix", [".jfif", ".JPEG", ".jpe", ".JPG"])
def test_jpegs_are_found_under_their_other_suffixes(suffix: str, tmp_path: Path) -> None:
    data = prepare(str(image_folder(tmp_path, suffix)), decoded_gib=1, max_corrupt=0)
    assert (len(data.train), len(data.validation)) == (6, 6)


@pytest.mark.parametrize("kind", ["webp", "gif", "avif", "jp2", "pbm"])
def test_images_in_other_forms_are_read(kind: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    new = folder / "train" / "cat" / f"new.{kind}"
    Image.open(io.BytesIO(photo(0))).convert("1" if kind == "pbm" else "RGB").save(new)
    data = prepare(str(folder), decoded_gib=1, max_corrupt=0)
    assert len(data.train) == 7


@pytest.mark.parametrize("name", ["a.heic", "b.JXL", "c.tar", "d.pgm.gz", "e.zip", "f.dcm", "g.tfrecord"])
def test_what_may_hold_images_and_is_not_read_is_refused(name: str, tmp_path: Path) -> None:
    write(image_folder(tmp_path), f"train/cat/{name}")
    with pytest.raises(
        ValueError, match=f"has train/cat/{name} packed or of a kind that nothing here reads; unpack or"
    ):
        prepare(str(tmp_path), decoded_gib=0, max_corrupt=0)


def test_a_tar_is_read_by_the_rule_of_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(image_folder(tmp_path / "d"), "train/.ipynb_checkpoints/1.jpg", "train/cat/._1.jpg", "README.md")
    (folder / "val" / "again").symlink_to("cat")
    (folder / "train" / "dog" / "9.jpg").symlink_to("../dog/1.jpg")
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(folder, "./d")
    said = []
    for source in (folder, tmp_path / "d.tar"):
        data = prepare(str(source), decoded_gib=0, max_corrupt=0)
        assert data.classes == ("cat", "dog")
        assert (len(data.train), len(data.validation)) == (6, 6)
        said.append(capsys.readouterr().err)
    assert "2 hidden (train/.ipynb_checkpoints, train/cat/._1.jpg)" in said[0]
    assert "1 of other kinds (README.md), 2 taken already by another name (train/dog/9.jpg, val/again)" in said[0]
    assert "2 hidden (d/train/.ipynb_checkpoints/1.jpg, d/train/cat/._1.jpg)" in said[1]
    assert "1 taken already by another name (d/train/dog/9.jpg)" in said[1]


def test_a_folder_whose_every_image_is_left_out_says_which(tmp_path: Path) -> None:
    write(tmp_path, "train/.a/1.jpg", "train/b/notes.txt")
    with pytest.raises(
        ValueError, match=r"holds 0 images in 0 class folders, left out 1 hidden \(train/.a\), 1 of other kinds"
    ):
        prepare(str(tmp_path), decoded_gib=0, max_corrupt=0)


# ---------------------------------------------------------------------------------------------------------------- greys


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


GREY = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)


@pytest.mark.parametrize(
    "data",
    [
        encoded(GREY, "png"),
        encoded(GREY, "tiff"),
        encoded(GREY, "ppm"),
        encoded((GREY / 65535).astype(np.float32), "tiff"),
    ],
    ids=["png", "tiff", "pgm", "float"],
)
def test_greys_of_more_than_8_bits_keep_their_levels(data: bytes) -> None:
    expected = (GREY >> 8).astype(int)
    image = sources.decode(data)
    assert np.abs(np.asarray(rgb(image))[..., 1].astype(int) - expected).max() <= 1
    for seen in (
        validation_view(sources.decode(data), 8, 8),
        training_view(sources.decode(data), View(8, "padded"), 8, [0.9, 0, 0.5, 0.5]),
        training_view(sources.decode(data), View(8, min_scale=1.0), 8, [0.9] + [0.0, *[0.5] * 3] * 30),
    ):
        assert len(np.unique(seen)) > 20, "black and white alone"
    again = np.asarray(sources.decode(bytes(jpeg_view(data, View(8), [0.9] * 42).file)))
    assert len(np.unique(again)) > 20


@pytest.mark.parametrize(
    "pixels",
    [np.full((8, 8), 300.0, np.float32), np.full((8, 8), np.nan, np.float32), np.full((8, 8), -0.5, np.float32), np.full((8, 8), 200, np.int32)],
)  # fmt: skip
def test_greys_whose_white_is_unknown_are_no_images(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a grey of 32 bits, .* whose white is unknown; save it in 8 or 16 bits"):
        rgb(sources.decode(encoded(pixels, "tiff")))


def test_greys_of_12_bits_in_16_are_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    for file in folder.rglob("*.jpg"):
        file.with_suffix(".png").write_bytes(encoded(GREY >> 4, "png"))
        file.unlink()
    with pytest.raises(
        ValueError, match="greys of 16 bits, of which the first images use only 0 to 4095 of 65535, would be"
    ):
        prepare(str(folder), decoded_gib=1, max_corrupt=0)


def test_a_cell_that_names_a_device_is_a_damaged_image() -> None:
    cells = [{"image": {"bytes": None, "path": "/dev/zero"}}, {"image": {"bytes": None, "path": __file__}}]
    with pytest.raises(ValueError, match="/dev/zero is no file"):
        sources.Table(cells, "image", "train").read(0)
    assert b"def test_a_cell" in sources.Table(cells, "image", "train").read(1)


@pytest.mark.parametrize(("values", "kind", "message"), [
    ([b"a text", b"\xff\xfe"], pyarrow.string(), "rows from 1 on: 'utf-8' codec can't decode"),
    ([2**62], pyarrow.timestamp("us"), "rows from 1 on"),
])  # fmt: skip
def test_cells_that_are_no_text_are_named_by_file(values: list[Any], kind: Any, message: str, tmp_path: Path) -> None:
    import pyarrow.parquet

    column = pyarrow.array(values).view(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=rf"t\.parquet cannot be read \({message}"):
        list(documents.read_file(tmp_path / "t.parquet"))


# ------------------------------------------------------------------------------------------------- as a viewer shows it

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    """32 x 16, two colours."""
    image = Image.new(mode, (32, 16), left)
    image.paste(right, (16, 0, 32, 16))
    return image


def with_palette(**how: Any) -> bytes:
    image = halves("P", 0, 1)
    image.putpalette([*RED, *GREEN])
    return saved(image, "png", **how)


def gif_with_transparency() -> bytes:
    image = halves("P", 0, 1)
    image.putpalette([*RED, *GREEN])
    return saved(image, "gif", transparency=1)


def turned(orientation: Any) -> dict[str, Any]:
    """What a camera writes that was held upright: the pixels lie on their side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def animated(kind: str) -> bytes:
    frames = [halves("RGB", RED, BLUE), halves("RGB", GREEN, GREEN)]
    return saved(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=100,
        **({"lossless": True} if kind != "gif" else {}),
    )


SHOWN: dict[str, tuple[bytes, tuple[int, ...], tuple[int, ...]]] = {
    "CMYK JPEG": (saved(halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "jpeg", quality=95), RED, BLUE),
    "CMYK TIFF": (saved(halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "tiff"), RED, BLUE),
    "palette": (with_palette(), RED, GREEN),
    "palette, a colour transparent": (with_palette(transparency=1), RED, WHITE),
    "palette, colours half transparent": (with_palette(transparency=bytes([255, 128])), RED, (127, 255, 127)),
    "RGBA": (saved(halves("RGBA", (*RED, 255), (0, 0, 0, 0)), "png"), RED, WHITE),
    "RGBA, half transparent": (saved(halves("RGBA", (*RED, 255), (*BLUE, 128)), "png"), RED, (127, 127, 255)),
    "LA": (saved(halves("LA", (255, 0), (0, 255)), "png"), WHITE, (0, 0, 0)),
    "a colour of RGB transparent": (saved(halves("RGB", RED, BLUE), "png", transparency=BLUE), RED, WHITE),
    "a level of grey transparent": (saved(halves("L", 100, 7), "png", transparency=7), (100, 100, 100), WHITE),
    "WebP with alpha": (saved(halves("RGBA", (*RED, 255), (0, 0, 0, 0)), "webp", lossless=True), RED, WHITE),
    "1 bit": (saved(halves("1", 1, 0), "png"), WHITE, (0, 0, 0)),
    "animated GIF": (animated("gif"), RED, BLUE),
    "animated WebP": (animated("webp"), RED, BLUE),
    "animated PNG": (animated("png"), RED, BLUE),
    "transparent GIF": (gif_with_transparency(), RED, WHITE),
    "YCbCr TIFF": (saved(halves("YCbCr", (76, 85, 255), (29, 255, 107)), "tiff"), RED, BLUE),
}


@pytest.mark.parametrize("name", SHOWN)
def test_an_image_is_read_as_a_viewer_shows_it(name: str) -> None:
    data, left, right = SHOWN[name]
    seen = np.asarray(rgb(sources.decode(data))).astype(int)
    assert seen.shape == (16, 32, 3)
    for column, colour in ((4, left), (28, right)):
        assert np.abs(seen[8, column] - colour).max() <= 4, seen[8, column]
    on_device = np.asarray(sources.decode(bytes(jpeg_view(data, View(8), [0.9] * 42).file))).astype(int)
    assert np.abs(on_device[8, 4] - left).max() <= 8


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_what_exif_has_turned_is_turned_back(kind: str) -> None:
    stored = halves("RGB", RED, BLUE)
    data = saved(stored, kind, **turned(6), **({"lossless": True} if kind == "webp" else {}))
    image = sources.decode(data)
    assert image.size == (16, 32)
    seen = np.asarray(rgb(image)).astype(int)
    assert np.abs(seen[4, 8] - RED).max() <= 4 and np.abs(seen[28, 8] - BLUE).max() <= 4
    view = jpeg_view(data, View(8), [0.9] * 42)
    assert sources.decode(bytes(view.file)).size == (16, 32) and view.box[2] <= 16
    for orientation in (1, 0, 9):
        assert sources.decode(saved(stored, "jpeg", **turned(orientation))).size == (32, 16)
    assert sources.decode(saved(stored, "jpeg", exif=b"Exif\0\0damaged")).size == (32, 16)


def test_greys_of_16_bits_are_turned_and_keep_their_levels() -> None:
    seen = np.asarray(rgb(sources.decode(saved(Image.fromarray(GREY), "png", **turned(3)))))
    assert np.abs(seen[..., 0].astype(int) - (GREY >> 8)[::-1, ::-1]).max() <= 1


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, 1, 2**40, 1], "int64", "below the number of training images, 4, got 1099511627776 in train, row 2"),
        (
            [0, 1, 2**64 - 1, 1],
            "uint64",
            "below the number of training images, 4, got 18446744073709551615 in train, row 2",
        ),
        ([[0], [1], [0, 1], [1]], "list", "the column label is .*; expected numbers of classes"),
        ([{"a": 0}, {"a": 1}, {"a": 0}, {"a": 1}], "struct", "the column label is .*; expected numbers of classes"),
        (["0", "1", "0", "1"], "string", "the column label is string; expected numbers of classes"),
        (
            [Decimal(0), Decimal(1), Decimal(0), Decimal(1)],
            "decimal",
            "the column label is decimal.*; expected numbers",
        ),
        ([None] * 4, "null", "the column label is null; expected numbers of classes"),
        ([datetime.date(2026, 1, 1)] * 4, "date", "the column label is date32; expected numbers of classes"),
        ([b"0", b"1", b"0", b"1"], "bytes", "the column label is binary; expected numbers of classes"),
        ([float("nan"), 1.0, 0.0, 1.0], "float", "the column label is float64; expected numbers of classes"),
        ([0, None, 1, 1], "int64", "below the number of training images, 4, got None in train, row 1"),
        ([False, True, True, False], "bool", "the column label is bool; expected numbers of classes"),
    ],
)
def test_labels_of_odd_type_or_huge_value(labels: list[Any], kind: str, message: str, tmp_path: Path) -> None:
    import pyarrow.parquet

    types = {"int64": pyarrow.int64(), "uint64": pyarrow.uint64()}
    column = pyarrow.array(labels, types.get(kind))
    cells = pyarrow.array([{"bytes": photo(i), "path": None} for i in range(len(labels))])
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": column}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=f"--data .*{message}"):
        prepare(str(tmp_path / "t.parquet"), decoded_gib=0, max_corrupt=0)


def test_a_huge_number_of_a_row_is_no_number(tmp_path: Path) -> None:
    write(tmp_path, "RTE/test.tsv", content=f"sentence1\tsentence2\tindex\na\tb\t{10**20}\n")
    with pytest.raises(ValueError, match=r"RTE/test\.tsv, line 2: index '1000.*' is no number"):
        glue.read_split(glue.TASKS["RTE"], "test", str(tmp_path))


# ----------------------------------------------------------------------------------------------------------------- GLUE


def test_tables_of_glue_are_read_compressed_and_refused_in_other_forms(tmp_path: Path) -> None:
    rows = b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n"
    task, root = glue.TASKS["WNLI"], str(tmp_path)
    write(tmp_path, "WNLI/train.tsv.bz2", content=bz2.compress(rows))
    write(tmp_path, "WNLI/DEV.TSV", content=rows)
    assert glue.missing(task, root) is None
    assert [glue.read_split(task, split, root).labels for split in ("train", "dev")] == [[1.0], [1.0]]
    write(tmp_path, "WNLI/train.tsv", content=rows)
    with pytest.raises(ValueError, match=r"holds train.tsv and train.tsv.bz2 in .*WNLI; keep one of them"):
        glue.missing(task, root)
    for other in ("train.csv", "train.tsv.zip", "train.jsonl", "train.parquet"):
        folder = write(tmp_path / other, f"WNLI/{other}", "WNLI/dev.tsv", content=rows)
        with pytest.raises(ValueError, match=rf"WNLI/{other} is not read; give WNLI/train.tsv"):
            glue.missing(task, str(folder))
    write(tmp_path / "cut", "WNLI/train.tsv.bz2", content=bz2.compress(rows)[:-5])
    with pytest.raises(ValueError, match=r"train.tsv.bz2 cannot be read"):
        glue.read_split(task, "train", str(tmp_path / "cut"))


def test_tables_that_the_tokenizer_does_not_know_are_refused(tmp_path: Path) -> None:
    train_wordpiece(["a cat sat on the mat"] * 9, 80).save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path / "tokenizer.json"))
    for split, word in (("train", "cat"), ("dev", "\u10d0\u10d1")):
        write(tmp_path, f"WNLI/{split}.tsv", content=f"index\tsentence1\tsentence2\tlabel\n0\t{word}\t{word}\t1\n")
    with pytest.raises(ValueError, match=r"WNLI/dev.tsv: 100% of the tokens are unknown to the tokenizer"):
        glue.tokenise(glue.TASKS["WNLI"], str(tmp_path), ours, 12)
