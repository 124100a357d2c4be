"""Metrics of image classification. Shape letters: B images, C classes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_core.images.batches import ValidationBatches, load, num_workers
from kd_core.images.sources import ImageSet, Split
from kd_core.losses import calibration
from kd_core.system import ranks
from kd_core.system.terminal import say
from kd_core.training.stop import interruptible

NUM_SUMS = 4 + 2 * calibration.BINS


def classification_sums(logits_BC: Tensor, labels_B: Tensor, counted_B: Tensor) -> Tensor:
    """What adds up over batches and ranks: see `classification_metrics`.

    Args:
        logits_BC: any float dtype; computed in float32.
        counted_B: bool; False for an image that only fills a batch.

    Returns:
        float32 [NUM_SUMS]: loss in nats, top-1 hits, top-5 hits, images; then by bin of the top
        probability the sums of that probability and of the hits.
    """
    logits_BC, weight_B = logits_BC.float(), counted_B.float()
    loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
    top_BK = logits_BC.topk(min(5, logits_BC.shape[1])).indices == labels_B[:, None]
    confidence_B = logits_BC.softmax(-1).amax(-1)
    bins = calibration.calibration_sums(confidence_B * weight_B, top_BK[:, 0] * weight_B)
    rows = torch.stack([loss_B, top_BK[:, 0].float(), top_BK.any(-1).float(), torch.ones_like(loss_B)])
    return torch.cat([rows @ weight_B, bins])


Seen = Iterator[tuple[Tensor, Tensor, Tensor]]  # pixels, labels and `counted` of batches on the device


@torch.no_grad()
def validation_sums(model: Any, images: Seen) -> Tensor:
    """`classification_sums` of images by a model in evaluation."""
    sums = torch.zeros(NUM_SUMS, device=ranks.device())
    for pixels, labels, counted in images:
        sums += classification_sums(model(pixels), labels, counted)
    return sums


def seen(batches: ValidationBatches, *, workers: int) -> Seen:
    """The batches one after the other; says how many images are corrupt."""
    left_out = 0
    for micro in interruptible(load(batches, range(len(batches)), workers=workers)):
        pixels, labels, counted = ranks.to_device(micro.pixels, micro.labels, micro.counted)
        yield pixels, labels, counted
        left_out += int(micro.corrupt)
    if left_out:
        say(f"rank {ranks.rank()}: {left_out} of {len(batches.split)} validation images are corrupt and left out")


def share(cfg: Any, split: Split) -> Seen:
    """This rank's share of a split, each image once over all ranks, in the view that is evaluated.

    Args:
        cfg: `ImageFlags` and `TrainFlags`.
    """
    batches = ValidationBatches(
        split, cfg.eval_resize, cfg.eval_size, cfg.micro_batch_size, ranks.rank(), ranks.world_size()
    )
    return seen(batches, workers=num_workers(cfg.workers, split))


@torch.no_grad()
def evaluate(
    cfg: Any, data: ImageSet, model: Any, *, shaped: Callable[[Tensor], Tensor] | None = None, prefix: str = "eval/"
) -> dict[str, float]:
    """Loss (nats), top-1, top-5 and expected calibration error on the validation images, over all ranks.

    Args:
        cfg: `ImageFlags` and `TrainFlags`.
        model: what gives logits [B, C] for pixels; it is left in evaluation.
        shaped: of its logits, what a method takes the softmax of; None: the logits.
        prefix: of the metrics' names, where a run evaluates several models.
    """
    model.eval()
    judged = model if shaped is None else lambda pixels: shaped(model(pixels))
    scores = classification_metrics(ranks.total(validation_sums(judged, share(cfg, data.validation))))
    return {prefix + name.removeprefix("eval/"): value for name, value in scores.items()}


def classification_metrics(sums: Tensor) -> dict[str, float]:
    """Mean loss (nats), top-1 and top-5 accuracy in [0, 1] and the expected calibration error, from summed sums."""
    loss, top1, top5, images, *bins = sums.tolist()
    if not images:
        raise ValueError("no validation image can be decoded; repair those of --data")
    return {
        "eval/loss": loss / images,
        "eval/accuracy": top1 / images,
        "eval/top5": top5 / images,
        "eval/calibration_error": calibration.calibration_error(bins, images),
    }
