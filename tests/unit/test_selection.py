"""Which unlabelled images are chosen: as many for each class, the first of equal scores, however they come; and images as one set."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd_core.images import selection
from kd_core.images.batches import ValidationBatches, training_batch
from kd_core.images.selection import TopPerClass
from kd_core.images.sources import Split, prepare_unlabelled
from kd_core.images.views import View

N, C, K = 200, 7, 12


@pytest.mark.parametrize("batch", [1, 5, 64, N])
def test_each_class_has_its_k_best_and_of_equal_scores_the_first(batch: int) -> None:
    scores = torch.randint(0, 9, (N, C), generator=torch.Generator().manual_seed(0)).float()  # of which many are equal
    top = TopPerClass(K)
    for at in range(0, N, batch):
        top.add(scores[at : at + batch], torch.arange(at, min(N, at + batch)))
    top.close()
    wanted = np.stack([np.lexsort((np.arange(N), -column))[:K] for column in scores.T.numpy()], 1)
    assert np.array_equal(top.ids_KC.numpy(), wanted)
    assert torch.equal(top.scores_KC, scores.gather(0, top.ids_KC))
    for column in top.ids_KC.T:
        assert len(column.unique()) == K


def test_what_ranks_have_found_is_what_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 8, 8, 3), np.uint8)
    split = Split(np.full(50, -1), pixels=pixels)
    cfg: Any = SimpleNamespace(eval_resize=8, eval_size=8, micro_batch_size=16, workers=0, check=lambda *_: None)

    def score(micro: Any) -> torch.Tensor:
        return micro.pixels[:, :, 0, 0].float()

    found: list[Any] = []
    for rank in (0, 1):
        monkeypatch.setattr(selection, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(selection, "world_size", lambda: 2)
        monkeypatch.setattr(selection, "gathered", lambda own: found.append(own) or found)
        both = selection.top_per_class(cfg, split, score, 9)
    monkeypatch.setattr(selection, "rank", lambda: 0)
    monkeypatch.setattr(selection, "world_size", lambda: 1)
    monkeypatch.setattr(selection, "gathered", lambda own: [own])
    assert np.array_equal(both, selection.top_per_class(cfg, split, score, 9))
    assert np.array_equal(both[0], pixels[:, 0, 0].argmax(0))


def test_what_was_chosen_is_read_again_and_other_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "broadcast", lambda value: value)
    fields: dict[str, Any] = {}
    clock = SimpleNamespace(part=lambda *_, **__: torch.no_grad())
    run: Any = SimpleNamespace(
        folder=tmp_path, recall=fields.get, update=fields.update, clock=clock, say=lambda _: None
    )
    assert selection.kept(run, lambda: np.array([4, 2, 9])).tolist() == [4, 2, 9]
    assert selection.kept(run, lambda: np.array([1])).tolist() == [4, 2, 9]
    np.save(tmp_path / selection.FILE, np.array([4, 2, 8]))
    with pytest.raises(ValueError, match=r"--resume: .*selected.npy does not hold what the run chose"):
        selection.kept(run, lambda: np.array([1]))
    (tmp_path / selection.FILE).unlink()
    with pytest.raises(ValueError, match="does not hold what the run chose"):
        selection.kept(run, lambda: np.array([1]))


def test_a_folder_without_classes_stands_beside_images_held_decoded(tmp_path: Path) -> None:
    drawn = np.random.default_rng(1).integers(0, 255, (5, 32, 32, 3), np.uint8)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number, pixels in enumerate(drawn):
        Image.fromarray(pixels).save(tmp_path / ("deep/er" if number else "") / f"{number}.png")
    settings: dict[str, Any] = dict(flag="--unlabelled", decoded_gib=1, max_corrupt=0)
    files, fingerprint = prepare_unlabelled(str(tmp_path), **settings)
    assert len(files) == 5 and set(files.labels) == {-1} and len(fingerprint) == 16
    decoded = Split(np.arange(3), pixels=drawn[:3] // 2)
    both = decoded.joined(files)
    seen = ValidationBatches(both, 32, 32, 8, 0, 1)[0].pixels.permute(0, 2, 3, 1).numpy()
    assert {one.tobytes() for one in seen} == {one.tobytes() for one in (*(drawn[:3] // 2), *drawn)}
    assert both.labels.tolist() == [0, 1, 2, -1, -1, -1, -1, -1] and seen[2].tobytes() == (drawn[2] // 2).tobytes()
    view = training_batch(both, View(32, "padded"), 32, 0, np.arange(8), np.zeros(8, np.int64)).pixels
    assert view.shape == (8, 3, 32, 32)
    alike = decoded.joined(Split(np.full(5, -1), pixels=drawn))
    assert alike.pixels is not None and np.array_equal(alike.pixels, np.concatenate([drawn[:3] // 2, drawn]))
    with pytest.raises(FileNotFoundError, match="--unlabelled nowhere/x/y: no such file or folder"):
        prepare_unlabelled("nowhere/x/y", **settings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--unlabelled .*empty"):
        prepare_unlabelled(str(tmp_path / "empty"), **settings)
