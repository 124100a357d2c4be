"""Images: sources and their splits, views as pure functions, batches over ranks, corrupt files."""

import dataclasses
import io
import itertools
import re
import signal
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from kd_core.images import batches as images
from kd_core.images import evaluation as classification
from kd_core.images import sources as image_sources
from kd_core.images.flags import ImageFlags
from kd_core.images.sources import prepare
from kd_core.images.views import View, mix, resized_box, shift, training_view, validation_view
from kd_core.system.hashing import uniforms
from tests.conftest import DATA, photo, photo_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photo_folder(tmp_path / "data", ("cat", "dog"), train=8, val=3)


def batches(data: image_sources.ImageSet, *, rank: int = 0, world_size: int = 1, micro: int = 8, **view: Any) -> Any:
    return images.TrainBatches(data.train, View(**{"size": 24} | view), 10, 7, 8, micro, rank, world_size)


def pixels(source: Any, numbers: Any) -> torch.Tensor:
    return torch.cat([source[number].pixels for number in numbers])


# ------------------------------------------------------------------------------------------------------------- sources


def test_a_folder_and_a_tar_of_it_hold_the_same_images(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(folder, "data")
    one, other = (prepare(str(path), decoded_gib=0, max_corrupt=0) for path in (folder, tmp_path / "data.tar"))
    for data in (one, other):
        assert data.classes == ("cat", "dog")
        assert (len(data.train), len(data.validation)) == (16, 6)
        assert data.train.labels.tolist() == [0] * 8 + [1] * 8
    assert torch.equal(pixels(batches(one), range(4)), pixels(batches(other), range(4)))


def test_decoded_data_is_kept_once_and_equals_the_files(folder: Path, tmp_path: Path) -> None:
    held = prepare(str(folder), decoded_gib=1, max_corrupt=0)
    assert held.train.pixels is not None and held.train.pixels.shape == (16, 32, 40, 3)
    first = Image.open(folder / "train" / "cat" / "0.jpg").convert("RGB")
    assert np.array_equal(held.train.pixels[0], np.asarray(first))
    again = prepare(str(folder), decoded_gib=1, max_corrupt=0)
    assert again.fingerprint == held.fingerprint
    assert prepare(str(folder), decoded_gib=0, max_corrupt=0).train.pixels is None


def test_a_file_replaced_by_one_of_the_same_size_is_decoded_again(folder: Path) -> None:
    file = folder / "train" / "cat" / "0.jpg"
    before = prepare(str(folder), decoded_gib=1, max_corrupt=1)
    file.write_bytes(bytes(file.stat().st_size))
    after = prepare(str(folder), decoded_gib=1, max_corrupt=1)
    assert (len(before.train), len(after.train)) == (16, 15)


def test_images_of_several_sizes_are_not_held(folder: Path) -> None:
    (folder / "train" / "dog" / "7.jpg").write_bytes(photo(0, 33, 32))
    data = prepare(str(folder), decoded_gib=1, max_corrupt=0)
    assert data.train.pixels is None
    assert pixels(batches(data), range(4)).shape == (32, 3, 24, 24)


def test_without_a_validation_split_a_hash_of_the_name_decides(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(60):
            (tmp_path / "data" / name / f"{number}.jpg").write_bytes(photo(number))
    data = prepare(str(tmp_path / "data"), decoded_gib=0, max_corrupt=0)
    assert len(data.train) + len(data.validation) == 120
    assert 0 < len(data.validation) < 12
    names = {split.encoded.name(i) for split in (data.train, data.validation) for i in range(len(split))}  # type: ignore[union-attr]
    assert len(names) == 120
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "data", "one/folder/higher")
    packed = prepare(str(tmp_path / "data.tar"), decoded_gib=0, max_corrupt=0)
    assert torch.equal(pixels(batches(packed), range(4)), pixels(batches(data), range(4)))
    assert packed.validation.encoded.read(0) == data.validation.encoded.read(0)  # type: ignore[union-attr]


def write(root: Path, *names: str) -> str:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(photo(number))
    return str(root)


SPLITS = ("train/cat/0.jpg", "train/dog/0.jpg", "val/cat/0.jpg", "val/dog/0.jpg")


@pytest.mark.parametrize("names", [
    ("train/cat/front/0.jpg", "train/dog/0.jpg", "val/cat/0.jpg", "val/dog/side/far/0.jpg"),
    ("a/b/train/cat/images/0.jpg", "a/b/train/dog/images/0.jpg", "a/b/val/cat/0.jpg", "a/b/val/dog/0.jpg"),
    (*SPLITS, "test/0.jpg"),
    (*SPLITS, "test/bird/0.jpg"),
])  # fmt: skip
def test_a_class_is_the_first_folder_below_the_split(names: tuple[str, ...], tmp_path: Path) -> None:
    data = prepare(write(tmp_path / "data", *names), decoded_gib=0, max_corrupt=0)
    assert data.classes == ("cat", "dog")
    assert (data.train.labels.tolist(), data.validation.labels.tolist()) == ([0, 1], [0, 1])


def test_without_splits_a_class_is_the_first_folder_and_may_be_named_as_a_split(tmp_path: Path) -> None:
    names = [f"all/{name}/{number}.jpg" for name in ("car/red", "train") for number in range(60)]
    data = prepare(write(tmp_path / "data", *names), decoded_gib=0, max_corrupt=0)
    assert data.classes == ("car", "train")


@pytest.mark.parametrize(("names", "message"), [
    ((*SPLITS, "val/1.jpg"), "val/1.jpg lies in no class folder"),
    ((*SPLITS, "1.jpg"), "1.jpg lies in no class folder"),
    (("train/0.jpg", "val/0.jpg"), "expected train/<class>/<image>"),
    ((*SPLITS, "val/bird/0.jpg"), "no training image of 1 class(es), bird;"),
    ((*SPLITS[:2], "val/cats/0.jpg", "val/dogs/0.jpg"), "no training image of 2 class(es), cats, dogs;"),
    (SPLITS[2:], "has only the splits ['validation']"),
    ((*SPLITS, "stray.parquet"), "holds both images and tables"),
])  # fmt: skip
def test_folders_that_do_not_say_what_is_what(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(write(tmp_path / "data", *names), decoded_gib=0, max_corrupt=0)


def test_links(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "cat" / "0.jpg").unlink()
    (folder / "train" / "cat" / "0.jpg").symlink_to("nowhere.jpg")
    data = prepare(str(folder), decoded_gib=1, max_corrupt=0.1)
    assert len(data.train) == 15, "a link to nothing is a damaged image"
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(folder, "./data")
        for name, kind, target in (
            ("hard", tarfile.LNKTYPE, "data/train/cat/1.jpg"),
            ("soft", tarfile.SYMTYPE, "../cat/1.jpg"),
        ):
            link = tarfile.TarInfo(f"data/train/dog/{name}.jpg")
            link.type, link.linkname = kind, target
            tar.addfile(link)
    data = prepare(str(tmp_path / "data.tar"), decoded_gib=1, max_corrupt=0.1)
    assert data.train.labels.tolist() == [0] * 7 + [1] * 9, "a soft link to what is taken is left out"
    assert data.train.pixels is not None
    assert np.array_equal(data.train.pixels[-1], data.train.pixels[0])


def table(path: Path, labels: list[Any], **columns: Any) -> str:
    import datasets

    features = columns.pop("features", None)
    rows = {"image": [{"bytes": photo(i), "path": None} for i in range(len(labels))], "label": labels} | columns
    datasets.Dataset.from_dict(rows, features=features and datasets.Features(features)).to_parquet(path)
    return str(path)


def test_the_spelling_of_a_path_changes_no_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "a" / "t.parquet", [0, 1] * 100)
    write(tmp_path / "b", *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(60)))
    monkeypatch.chdir(tmp_path / "a")
    for one, other in (("t.parquet", f"{tmp_path}/a/t.parquet"), ("../b", f"{tmp_path}/b")):
        held_out = []
        for source in (one, other):
            split = prepare(source, decoded_gib=0, max_corrupt=0).validation
            assert split.encoded is not None
            held_out.append([split.encoded.read(row) for row in range(len(split))])
        assert held_out[0] and held_out[0] == held_out[1]


@pytest.mark.parametrize(("labels", "message"), [
    ([0, 1, None, 1], "labels must be at least 0 .*, got None in train, row 2"),
    ([0, 1, 1, -1], "labels must be at least 0 .*, got -1 in train, row 3"),
    (["cat", "dog"], "the column label is string; expected numbers of classes"),
    ([0.0, 1.0], "the column label is float64; expected numbers of classes"),
])  # fmt: skip
def test_labels_that_are_no_classes(labels: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--data .*{message}"):
        prepare(table(tmp_path / "t.parquet", labels), decoded_gib=0, max_corrupt=0)


def test_labels_beyond_the_named_classes_and_tables_without_them(tmp_path: Path) -> None:
    import datasets

    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    for split in ("train", "validation"):
        table(tmp_path / "tables" / f"{split}.parquet", [0, 1, 2, 1], features=features)
    assert len(prepare(str(tmp_path / "tables"), decoded_gib=0, max_corrupt=0).classes) == 3
    datasets.Dataset.from_dict({"image": [b"x"]}).to_parquet(tmp_path / "tables" / "test.parquet")
    data = prepare(str(tmp_path / "tables"), decoded_gib=0, max_corrupt=0)
    assert len(data.validation) == 4, "a test split beside a validation split is not read"
    (tmp_path / "tables" / "validation.parquet").unlink()
    with pytest.raises(ValueError, match="--data"):
        prepare(str(tmp_path / "tables"), decoded_gib=0, max_corrupt=0)
    tables = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "label": [2]})
    )
    features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    tables["train"]._info.features = datasets.Features(features)
    with pytest.raises(ValueError, match="labels must be in 0 to 1, got 2 in train, row 0"):
        image_sources._tables(tables, "x", "x")


def test_an_empty_cell_is_a_damaged_image(tmp_path: Path) -> None:
    cells = [None, {"bytes": None, "path": None}, *({"bytes": photo(i), "path": None} for i in range(198))]
    source = table(tmp_path / "t.parquet", [0, 1] * 100, image=cells)
    data = prepare(source, decoded_gib=1, max_corrupt=0.1)
    assert len(data.train) + len(data.validation) == 198


@pytest.mark.parametrize("decoded_gib", [0, 1])
@pytest.mark.parametrize("damage", [b"damaged", photo(0)[:300]])
def test_a_validation_split_that_is_all_damaged_is_refused(folder: Path, decoded_gib: float, damage: bytes) -> None:
    for file in (folder / "val").rglob("*.jpg"):
        file.write_bytes(damage)
    with pytest.raises(ValueError, match="no image of the validation split can be decoded; repair"):
        prepare(str(folder), decoded_gib=decoded_gib, max_corrupt=0.9)
    with pytest.raises(ValueError, match="no validation image can be decoded"):
        classification.classification_metrics(torch.zeros(classification.NUM_SUMS))


def test_an_evaluation_says_how_many_images_it_leaves_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 2):
        (folder / "val" / "dog" / f"{number}.jpg").write_bytes(photo(0)[:300])
    share = images.ValidationBatches(prepare(str(folder), decoded_gib=0, max_corrupt=1).validation, 32, 24, 4, 0, 1)
    given = classification.seen(share, workers=0)
    sums = classification.validation_sums(lambda pixels: torch.zeros(len(pixels), 2), given)
    assert sums[3] == 4
    assert "rank 0: 2 of 6 validation images are corrupt and left out" in capsys.readouterr().err


def test_parquet_with_a_test_split_only(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split, count in (("train", 6), ("test", 4)):
        rows = {"img": [{"bytes": photo(i), "path": None} for i in range(count)], "label": [0, 1] * (count // 2)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "tables" / f"{split}-0.parquet")
    data = prepare(str(tmp_path / "tables"), decoded_gib=1, max_corrupt=0)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.validation)) == (6, 4)
    expected = np.asarray(Image.open(io.BytesIO(photo(5))).convert("RGB"))
    assert data.train.pixels is not None and np.array_equal(data.train.pixels[5], expected)


def test_corrupt_images_are_left_out_of_held_data_up_to_a_share(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train" / "cat" / "3.jpg").write_bytes(photo(3)[:100])
    with pytest.raises(ValueError, match="1 of 22 images are corrupt"):
        prepare(str(folder), decoded_gib=1, max_corrupt=0.01)
    data = prepare(str(folder), decoded_gib=1, max_corrupt=0.1)
    assert len(data.train) == 15 and data.train.labels.tolist() == [0] * 7 + [1] * 8
    assert "train/cat/3.jpg" in capsys.readouterr().err
    with pytest.raises(ValueError, match="1 of 22 images are corrupt"):
        prepare(str(folder), decoded_gib=1, max_corrupt=0)


@pytest.mark.parametrize("name", ["imagenette224/imagenette224_subset.tar", "cifar10"])
def test_real_data(name: str) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent")
    data = prepare(str(DATA / name), decoded_gib=0, max_corrupt=0)
    assert len(data.classes) == 10
    assert (len(data.train), len(data.validation)) == ((3000, 1000) if "nette" in name else (50_000, 10_000))
    assert np.bincount(data.validation.labels).tolist() == [len(data.validation) // 10] * 10
    micro = images.TrainBatches(data.train, View(32), 10, 0, 16, 16, 0, 1)[3]
    assert micro.pixels.is_contiguous(memory_format=torch.channels_last)
    assert 60 < micro.pixels.float().mean() < 180


# --------------------------------------------------------------------------------------------------------------- views


def test_views_are_a_function_of_seed_epoch_and_image(folder: Path) -> None:
    data = prepare(str(folder), decoded_gib=1, max_corrupt=0)
    whole = pixels(batches(data), range(6))
    halves = [pixels(batches(data, rank=rank, world_size=2, micro=2), range(4, 6)) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), whole[16:24])
    assert not torch.equal(whole[:16].sort(0).values, whole[16:32].sort(0).values), "every epoch shows other views"
    workers = images.load(batches(data), range(2, 4), workers=2)
    assert torch.equal(torch.cat([micro.pixels for micro in workers]), whole[16:32])


def test_images_that_each_padded_crop_makes_smaller_are_resized_once_to_the_same_pixels() -> None:
    split = prepare("synthetic:4x24", decoded_gib=1, max_corrupt=0).train
    view = View(16, crop="padded")
    made = [images.TrainBatches(part, view, 10, 7, 64, 64, 0, 1) for part in (split, images.smaller(split, view))]
    assert made[1].split.pixels.shape == (len(split), 16, 16, 3)
    assert torch.equal(made[0][3].pixels, made[1][3].pixels)
    for same in (View(24, crop="padded"), View(32, crop="padded"), View(16)):
        assert images.smaller(split, same) is split


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_a_signal_to_the_process_group(folder: Path, number: int) -> None:
    others = set(psutil.Process().children())  # of other tests, such as the compiler's
    made = images.load(batches(prepare(str(folder), decoded_gib=1, max_corrupt=0)), range(10), workers=1)
    next(made)
    (worker,) = set(psutil.Process().children()) - others
    subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    assert len(list(itertools.islice(made, 5))) == 5
    with pytest.raises(RuntimeError, match="exited unexpectedly with exit code 143"):
        worker.terminate()  # by its rank
        worker.wait(120)


def test_patterns_repeat_the_views_of_their_own_seed_in_other_orders(folder: Path) -> None:
    def by_key(source: Any, numbers: range) -> dict[Any, torch.Tensor]:
        micros = [source[number] for number in numbers]
        keys = zip(
            *(torch.cat(keys).tolist() for keys in zip(*(micro.keys for micro in micros), strict=True)), strict=True
        )
        return dict(zip(keys, torch.cat([micro.pixels for micro in micros]), strict=True))

    data = prepare(str(folder), decoded_gib=1, max_corrupt=0)
    expected = by_key(batches(data), range(4))
    shared = images.TrainBatches(data.train, View(24), 10, 8, 8, 8, 0, 1, view_seed=7, view_patterns=2)
    for two_epochs in (range(4), range(4, 8)):
        views = by_key(shared, two_epochs)
        assert views.keys() == expected.keys()
        assert all(torch.equal(view, expected[key]) for key, view in views.items())


def flags(folder: Path, **own: Any) -> ImageFlags:
    return ImageFlags(data=str(folder), max_corrupt=0, **own)


@pytest.mark.parametrize("decoded_gib", [0, 1])
def test_what_is_held_out_is_not_trained_on_and_the_same_in_every_run(folder: Path, decoded_gib: float) -> None:
    whole, data = (images.build(flags(folder, decoded_gib=decoded_gib, held_out=share)) for share in (0, 0.25))
    assert whole.held_out is None and data.held_out is not None
    assert (len(data.train), len(data.held_out), len(data.validation)) == (12, 4, 6)
    seen = [views(split) for split in (data.train, data.held_out)]
    assert sorted(seen[0] + seen[1]) == sorted(views(whole.train)), "an image in both, or in neither"
    assert views(images.build(flags(folder, decoded_gib=decoded_gib, held_out=0.25)).held_out) == seen[1]
    assert data.fingerprint != whole.fingerprint
    with pytest.raises(ValueError, match=r"--held-out 0.01 of the 16 training images is none; give more"):
        images.build(flags(folder, held_out=0.01))


def views(split: Any) -> list[tuple[int, bytes]]:
    """Label and pixels of each image."""
    made = classification.ValidationBatches(split, 32, 32, len(split), 0, 1)[0]
    return [(int(label), one.numpy().tobytes()) for label, one in zip(made.labels, made.pixels, strict=True)]


def test_label_noise_gives_a_share_of_the_training_images_another_class_and_leaves_the_rest_clean() -> None:
    clean, noisy = (images.build(ImageFlags(data="digits", held_out=0.2, label_noise=share)) for share in (0, 0.25))
    assert clean.held_out is not None and noisy.held_out is not None
    wrong = clean.train.labels != noisy.train.labels
    assert wrong.mean() == pytest.approx(0.25, abs=0.03)
    assert np.array_equal(clean.train.pixels, noisy.train.pixels)
    for one, other in ((clean.held_out, noisy.held_out), (clean.validation, noisy.validation)):
        assert np.array_equal(one.labels, other.labels)
    moved = (noisy.train.labels - clean.train.labels)[wrong] % 10
    assert set(moved) == set(range(1, 10)) and np.bincount(moved).max() < 2 * np.bincount(moved)[1:].min()
    again = images.build(ImageFlags(data="digits", held_out=0.2, label_noise=0.25))
    assert np.array_equal(again.train.labels, noisy.train.labels) and again.fingerprint == noisy.fingerprint
    assert noisy.fingerprint != clean.fingerprint


def test_partial_mixup_is_a_function_of_the_images_on_any_rank_and_leaves_the_others(folder: Path) -> None:
    data = prepare(str(folder), decoded_gib=1, max_corrupt=0)
    plain = batches(data)[3]
    torch.manual_seed(1)
    given = plain.mixed(1.0, 0.0, 2, share=0.5).to(torch.device("cpu"))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn), "the generator was left elsewhere"
    again = plain.mixed(1.0, 0.0, 2, share=0.5).to(torch.device("cpu"))
    assert torch.equal(given.pixels, again.pixels) and torch.equal(given.labels, again.labels)
    later = batches(data)[4].mixed(1.0, 0.0, 2, share=0.5).to(torch.device("cpu"))
    stays, also = ((one.labels.amax(1) == 1) for one in (given, later))
    assert 0 < stays.sum() < 8 and not torch.equal(stays, also)
    halves = [batches(data, rank=rank, world_size=2, micro=4)[3] for rank in range(2)]  # each mixed by its own images
    assert all(half.mixed(1.0, 0.0, 2, share=0.0).to(torch.device("cpu")).pixels is half.pixels for half in halves)


def test_mixing_takes_a_share_of_the_pairs_each_by_a_draw_of_its_own() -> None:
    torch.manual_seed(0)
    count = 4000
    pixels = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    labels = torch.arange(count) % 5
    mixed, shares = mix(pixels, labels, 1.0, 0.0, num_classes=5, share=0.1)
    own = shares[torch.arange(count), labels]
    chosen = own < 1
    assert chosen.float().mean() == pytest.approx(0.1, abs=0.02)
    assert (
        own[chosen].mean() == pytest.approx(0.5, abs=0.06) and own[chosen].unique().numel() > 300
    )  # uniform: Beta(1, 1)
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    neighbour = shares[torch.arange(count), labels.roll(1)]
    torch.testing.assert_close(own + neighbour, torch.ones(count))
    wanted = own.view(-1, 1, 1, 1) * pixels + neighbour.view(-1, 1, 1, 1) * pixels.roll(1, 0)
    torch.testing.assert_close(mixed, wanted)
    everywhere = mix(pixels, labels, 1.0, 0.0, num_classes=5, share=1.0)[1]
    assert (everywhere.amax(1) < 1).all()


def test_every_epoch_visits_every_image_once(folder: Path) -> None:
    source = batches(prepare(str(folder), decoded_gib=1, max_corrupt=0))
    ids = torch.cat([source[number].sample_ids for number in range(6)]).view(3, 16)
    assert all(epoch.sort().values.tolist() == list(range(16)) for epoch in ids)
    assert not torch.equal(ids[0], ids[1])


def test_random_boxes_are_distributed_as_torchvisions() -> None:
    numbers = uniforms(0, np.zeros(4000, int), np.arange(4000), 40)
    ours = np.array([resized_box(60, 40, row, 0.08) for row in numbers.tolist()])
    image = torch.zeros(3, 40, 60)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array([[box["left"], box["top"], box["width"], box["height"]] for box in drawn])
    assert np.allclose(ours.mean(0), theirs.mean(0), rtol=0.05, atol=0.3)
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.05)
    assert (ours[:, 0] + ours[:, 2]).max() == 60 and (ours[:, 1] + ours[:, 3]).max() == 40


def test_a_wide_image_falls_back_to_its_centre() -> None:
    left, top, width, height = resized_box(1000, 10, [0.99, 0.5, 0.5, 0.5] * 10, 0.9)
    assert (top, height) == (0, 10) and width == 13 and left == (1000 - 13) // 2


def test_the_shift_moves_by_up_to_an_eighth_and_fills_with_black() -> None:
    image = np.full((16, 16, 3), 9, np.uint8)
    assert np.array_equal(shift(image, 0.5, 0.5), image)
    corner = shift(image, 0.0, 0.999)
    assert (corner[:14, 2:] == 9).all() and (corner[14:] == 0).all() and (corner[:, :2] == 0).all()


def test_the_coarse_decoding_of_a_large_jpeg_is_near_the_whole_one() -> None:
    data, view = photo(1, 800, 600), View(64, min_scale=0.5)
    numbers = uniforms(3, np.zeros(1, int), np.arange(1), view.numbers)[0].tolist()
    coarse = training_view(Image.open(io.BytesIO(data)), view, 64, numbers)
    whole = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(coarse.astype(int) - training_view(whole, view, 64, numbers).astype(int)).mean() < 3


def test_the_validation_view_is_torchvisions() -> None:
    whole = np.array(Image.open(io.BytesIO(photo(1, 80, 60))).convert("RGB"))
    reference = v2.Compose([v2.ToImage(), v2.Resize(48, antialias=True), v2.CenterCrop(40)])(whole)
    assert np.array_equal(validation_view(whole, 48, 40), reference.permute(1, 2, 0).numpy())


def test_randaugment_is_reproducible_in_workers(folder: Path) -> None:
    data = prepare(str(folder), decoded_gib=1, max_corrupt=0)
    one, other = (
        torch.cat([m.pixels for m in images.load(batches(data, randaugment=9), range(2), workers=n)]) for n in (1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, pixels(batches(data), range(2)))


def test_progressive_sizes() -> None:
    view = View(224, initial_scale=0.5)
    sizes = [view.size_at(step, 100) for step in range(100)]
    assert set(sizes[:41]) == {112} and set(sizes[80:]) == {224}
    assert sizes == sorted(sizes) and all(size % 4 == 0 for size in sizes)
    assert {View(30).size_at(step, 10) for step in range(10)} == {30}
    assert View(32, initial_scale=0.01).size_at(0, 10) == 8


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_counts_every_image_once(folder: Path, world_size: int) -> None:
    data = prepare(str(folder), decoded_gib=1, max_corrupt=0)
    seen, lengths = [], set()
    for rank in range(world_size):
        share = images.ValidationBatches(data.validation, 32, 24, 2, rank, world_size)
        lengths.add(len(share))
        for micro in images.load(share, range(len(share)), workers=0):
            seen += micro.sample_ids[micro.counted].tolist()
    assert sorted(seen) == list(range(6))
    assert len(lengths) == 1


def test_corrupt_images_are_replaced_in_training_and_left_out_of_validation(folder: Path) -> None:
    for name in ("train/cat/3.jpg", "val/dog/1.jpg"):
        (folder / name).write_bytes(b"damaged")
    data = prepare(str(folder), decoded_gib=0, max_corrupt=0.5)
    micros = [batches(data)[number] for number in range(2)]
    assert sum(float(micro.corrupt) for micro in micros) == 1
    ids = torch.cat([micro.sample_ids for micro in micros])
    assert sorted(ids.tolist()) == sorted([*range(3), 4, *range(4, 16)])
    both = torch.cat([micro.pixels for micro in micros])[ids == 4]
    assert torch.equal(*both), "what replaces an image is its successor's own view"
    share = images.ValidationBatches(data.validation, 32, 24, 6, 0, 1)
    assert share[0].counted.tolist() == [True] * 4 + [False] + [True]


@pytest.mark.parametrize(
    "device", [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str
)
def test_views_decoded_on_the_device_are_near_those_of_the_workers(folder: Path, device: torch.device) -> None:
    grey = io.BytesIO()
    Image.open(folder / "train" / "dog" / "0.jpg").convert("L").save(grey, "jpeg")
    (folder / "train" / "dog" / "0.jpg").write_bytes(grey.getvalue())
    Image.open(folder / "train" / "dog" / "1.jpg").save(folder / "train" / "dog" / "1.png")
    (folder / "train" / "dog" / "1.jpg").unlink()
    (folder / "train" / "dog" / "2.jpg").write_bytes(photo(2)[:-200])
    data = prepare(str(folder), decoded_gib=0, max_corrupt=1)
    for number in (0, 1):
        here = batches(data)[number]
        there = images.TrainBatches(data.train, View(24), 10, 7, 8, 8, 0, 1, nvjpeg=True)[number]
        assert torch.equal(here.sample_ids, there.sample_ids) and torch.equal(here.corrupt, there.corrupt)
        pixels_BCHW = images.on_device(there, device)
        assert pixels_BCHW.dtype == torch.uint8 and pixels_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert (pixels_BCHW.cpu().float() - here.pixels.float()).abs().mean() < 4


@dataclasses.dataclass(frozen=True)
class Numbered(torch.utils.data.Dataset):
    """Batches of one image whose pixels are their number."""

    def __getitem__(self, number: int) -> images.MicroBatch:
        one = torch.full((1,), number)
        pixels = torch.full((1, 3, 64, 64), number, dtype=torch.uint8)
        return images.MicroBatch(pixels, one, one, one, one.bool(), torch.tensor(0.0))


@pytest.mark.parametrize("left", [10**12, 1000])
def test_batches_of_workers_arrive_whatever_shared_memory_is_left(
    left: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Docker's 64 MiB: PyTorch's worker failed in a thread, and the run waited for ever."""
    monkeypatch.setattr(images, "shared_memory_left", lambda: left)
    got = list(images.load(Numbered(), range(5), workers=1))
    assert [int(micro.pixels[0, 0, 0, 0]) for micro in got] == [int(micro.labels) for micro in got] == list(range(5))
    said = capsys.readouterr().err.count("/dev/shm has 0 MiB left, too little for batches of images")
    assert said == (left == 1000)


def test_without_shared_memory_images_are_decoded_by_the_rank_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(images.multiprocessing, "Lock", refuse)
    images.can_have_workers.cache_clear()
    got = list(images.load(Numbered(), range(3), workers=2))
    images.can_have_workers.cache_clear()
    assert [int(micro.labels) for micro in got] == [0, 1, 2]
    assert "/dev/shm cannot be used (Read-only file system)" in capsys.readouterr().err
