"""Training images that a run holds out, labels that it has wrong, classes taken as one: functions of the data alone, the same in every run."""

from dataclasses import replace

import numpy as np

from kd_core.images.sources import ImageSet, Split
from kd_core.system.hashing import uniforms

SEED = 23  # of both; not the run's, as splits are the same for every --seed


def hold_out(data: ImageSet, share: float) -> ImageSet:
    """`data` with a share of its training images in `held_out` instead.

    Raises:
        ValueError: that is not one image.
    """
    count = round(share * len(data.train))
    if not count:
        raise ValueError(f"--held-out {share} of the {len(data.train)} training images is none; give more")
    order = np.random.default_rng(SEED).permutation(len(data.train))
    held_out, train = (data.train.part(np.sort(rows)) for rows in (order[:count], order[count:]))
    return replace(data, train=train, held_out=held_out, fingerprint=f"{data.fingerprint}, {share} held out")


def with_label_noise(data: ImageSet, share: float) -> ImageSet:
    """`data` with another class, all alike probable, as label of a share of the training images; other splits stay."""
    labels, classes = data.train.labels, len(data.classes)
    ids = np.arange(len(labels))
    chosen, other = uniforms(SEED, np.zeros_like(ids), ids, 2).T
    wrong = (labels + 1 + (other * (classes - 1)).astype(np.int64)) % classes
    train = Split(np.where(chosen < share, wrong, labels), data.train.encoded, data.train.pixels)
    return replace(data, train=train, fingerprint=f"{data.fingerprint}, {share} wrong")


def merged(data: ImageSet, count: int) -> ImageSet:
    """`data` with `count` classes, each of those whose numbers leave its own as remainder; which one it was is kept as `parts`.

    Raises:
        ValueError: that are no fewer classes.
    """
    if count >= len(data.classes):
        raise ValueError(
            f"--merge-classes {count} of the {len(data.classes)} classes of --data are no fewer; give less"
        )

    def of(split: Split) -> Split:
        return replace(split, labels=split.labels % count, parts=split.labels // count)

    classes = tuple("+".join(data.classes[number::count]) for number in range(count))
    held_out = None if data.held_out is None else of(data.held_out)
    return replace(
        data, classes=classes, train=of(data.train), validation=of(data.validation), held_out=held_out,
        fingerprint=f"{data.fingerprint}, merged",
    )  # fmt: skip
