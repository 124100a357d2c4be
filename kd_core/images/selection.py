"""Which of many unlabelled images a run learns from: chosen once, by what a teacher says of them, and kept in the run's folder.

Shape letters: N images, C classes, K images of a class.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_core.images.batches import MicroBatch, ValidationBatches, load, num_workers
from kd_core.images.sources import Split
from kd_core.system.files import writing
from kd_core.system.ranks import broadcast, device, gathered, rank, world_size
from kd_core.training.loop import Run

FILE = "selected.npy"  # in the run's folder: int64, numbers of images


class TopPerClass:
    """For each class the K images of the highest score, of images that come in the order of their numbers; of equal scores the first.

    An image may be among those of several classes. Memory: 2 K rows of scores and numbers.

    Attributes:
        scores_KC, ids_KC: what was found, the highest first; fewer rows while fewer images have come.
    """

    def __init__(self, per_class: int) -> None:
        self._most, self._waiting, self._rows = per_class, list[tuple[Tensor, Tensor]](), 0
        self.scores_KC = self.ids_KC = torch.empty(0)

    def add(self, scores_NC: Tensor, ids: Tensor) -> None:
        """
        Args:
            scores_NC: of images.
            ids: int64 [N], their numbers; or [N, C], where each class has images of its own.
        """
        self._waiting.append((scores_NC, ids[:, None].expand_as(scores_NC) if ids.ndim == 1 else ids))
        self._rows += len(scores_NC)
        if self._rows >= self._most:  # not each time, as K may be far more than a batch
            self.close()

    def close(self) -> None:
        """Takes in what `add` has put off."""
        if self._waiting:
            known = [(self.scores_KC, self.ids_KC)] if len(self.scores_KC) else []
            scores, ids = (torch.cat(one) for one in zip(*known, *self._waiting, strict=True))
            order = scores.argsort(dim=0, descending=True, stable=True)[: self._most]
            self.scores_KC, self.ids_KC = scores.gather(0, order), ids.gather(0, order)
            self._waiting, self._rows = [], 0


@torch.no_grad()
def top_per_class(cfg: Any, split: Split, score: Callable[[MicroBatch], Tensor], per_class: int) -> np.ndarray:
    """Numbers of the images that score highest for each class, int64 [K, C]; every rank looks at its share.

    Args:
        cfg: `ImageFlags` and `TrainFlags`; the views are those of evaluation.
        score: [N, C] of a micro-batch on the device.

    Raises:
        ValueError: fewer than `per_class` images can be read.
    """
    own, top = TopPerClass(per_class), TopPerClass(per_class)
    batches = ValidationBatches(split, cfg.eval_resize, cfg.eval_size, cfg.micro_batch_size, rank(), world_size())
    for micro in load(batches, range(len(batches)), workers=num_workers(cfg.workers, split)):
        counted = micro.counted
        own.add(score(micro.to(device())).float()[counted.to(device())], micro.sample_ids[counted].to(device()))
    own.close()
    for found in gathered((own.scores_KC.cpu(), own.ids_KC.cpu())):  # ranks' shares are in the order of the numbers
        top.add(*found)
    top.close()
    there = len(top.ids_KC)
    cfg.check("per_class", there == per_class, f"at most the number of images that can be read, {there}")
    return top.ids_KC.numpy()


def kept(run: Run[Any], choose: Callable[[], np.ndarray]) -> np.ndarray:
    """Numbers of images, as `choose` gives them on every rank when the run begins: a resumed run reads them in its folder.

    The seconds of choosing are the training's.

    Raises:
        ValueError: a resumed run's are not there, or others.
    """
    file, known = run.folder / FILE, run.recall("selected")
    if known is None:
        with run.clock.part("train", on_host=True):
            ids = broadcast(choose().astype(np.int64))
        if rank() == 0:
            _write(file, ids)
        run.update(selected={"images": len(ids), "digest": _digest(ids)})
    else:
        read: Any = broadcast(np.load(file) if rank() == 0 and file.exists() else None)
        if read is None or _digest(ids := read) != known["digest"]:
            raise ValueError(f"--resume: {file} does not hold what the run chose; restore it, or start a new run")
    run.say(f"{len(ids)} unlabelled images are chosen")
    return ids


def _write(file: Path, ids: np.ndarray) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    with writing(temporary, needs=ids.nbytes):
        with temporary.open("wb") as stream:
            np.save(stream, ids)
        temporary.replace(file)


def _digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()
