"""Batches for masked language modelling, from the rows of a corpus.

Order and cutting are those of `batches`; the masks of a row are a pure function of the seed, the epoch and the row.

Shapes: B sequences, T positions, N supervised positions (B times K a sequence).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kd_core.system.hashing import splitmix64 as _hash
from kd_core.text.batches import RowBatches, Step, ahead, validation_shares
from kd_core.text.corpus import IGNORE_INDEX, Corpus
from kd_core.text.flags import check_mask_fraction
from kd_core.training.loop import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
VALIDATION_MASK_SEED = 20221100683  # any constant: validation masks are the same for every run


# ------------------------------------------------------------------------------------------------------------- masking


class MaskingVocabulary(NamedTuple):
    mask_id: int
    is_special: np.ndarray  # bool [V]
    ordinary_ids: np.ndarray  # int64 [V minus special tokens]


@functools.lru_cache(maxsize=4)
def masking_vocabulary(tokenizer: "PreTrainedTokenizerFast") -> MaskingVocabulary:
    ids = np.unique(np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64))
    is_special = np.zeros(ids[-1] + 1, dtype=bool)
    is_special[tokenizer.all_special_ids] = True
    return MaskingVocabulary(int(tokenizer.mask_token_id), is_special, ids[~is_special[ids]])


def _mask(
    rows_BT: np.ndarray,
    sample_ids_B: np.ndarray,
    *,
    seed: int,
    epoch: int | np.ndarray,
    fraction: float,
    tokenizer: "PreTrainedTokenizerFast",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hides tokens for a model to predict; a pure function of (seed, epoch, sample id, position) for each position.

    In each row, the K = round(fraction * T) ordinary positions with the smallest hashes are supervised; of these 80 % become
    [MASK], 10 % a random ordinary token, 10 % stay. A row with fewer ordinary positions is filled up with positions
    whose label is `IGNORE_INDEX`, so that shapes never change.

    Args:
        rows_BT: token ids, any integer type.
        epoch: of all rows, or int [B].

    Returns:
        input_ids [B, T]; the supervised columns [B, K], ascending; their labels [B, K]; all int64.

    Source: Devlin et al. 2018, section 3.1. There each position is drawn by itself; here their number in a row is fixed.
    """
    vocabulary = masking_vocabulary(tokenizer)
    T = rows_BT.shape[1]
    K = round(fraction * T)
    input_ids_BT = rows_BT.astype(np.int64)

    # The low 16 bits hold the position: hashes never tie, and the smallest ones bring their positions along.
    position_bits = np.uint64(0xFFFF)
    base_B = _hash(_hash(_hash(np.uint64(seed)) ^ np.asarray(epoch, np.uint64)) ^ sample_ids_B.astype(np.uint64))
    hashes_BT = _hash(base_B[:, None] + np.arange(T, dtype=np.uint64))
    order_BT = (hashes_BT & ~position_bits) | np.arange(T, dtype=np.uint64)
    order_BT |= np.where(vocabulary.is_special[rows_BT], ~position_bits, np.uint64(0))
    smallest_BK = np.partition(order_BT, K - 1, axis=1)[:, :K]
    columns_BK = np.sort((smallest_BK & position_bits).astype(np.int64), axis=1)

    originals_BK = np.take_along_axis(input_ids_BT, columns_BK, axis=1)
    supervised_BK = ~vocabulary.is_special[originals_BK]
    labels_BK = np.where(supervised_BK, originals_BK, IGNORE_INDEX)

    draws_BK = _hash(np.take_along_axis(hashes_BT, columns_BK, axis=1))
    tenth_BK = draws_BK % np.uint64(10)
    random_BK = vocabulary.ordinary_ids[
        ((draws_BK >> np.uint64(8)) % np.uint64(len(vocabulary.ordinary_ids))).astype(np.int64)
    ]
    hidden_BK = np.where(tenth_BK < 8, vocabulary.mask_id, np.where(tenth_BK == 8, random_BK, originals_BK))
    np.put_along_axis(input_ids_BT, columns_BK, np.where(supervised_BK, hidden_BK, originals_BK), axis=1)
    return input_ids_BT, columns_BK, labels_BK


def _flat_positions(columns_BK: np.ndarray, T: int) -> np.ndarray:
    return (columns_BK + T * np.arange(len(columns_BK))[:, None]).reshape(-1)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank feeds to one forward."""

    input_ids: torch.Tensor  # int64 [B, T]
    positions: torch.Tensor  # int64 [N], indices into B * T, ascending
    labels: torch.Tensor  # int64 [N], IGNORE_INDEX where unsupervised
    sample_ids: torch.Tensor  # int64 [B], see `sample_id`
    epochs: torch.Tensor  # int64 [B], of the masks

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a model takes."""
        return self.input_ids, self.positions

    @property
    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What says which rows these are, and how they are masked."""
        return self.sample_ids, self.epochs

    def at_all_positions(self) -> "MicroBatch":
        """The same with every position of its rows, in their order; the labels of those not supervised are ignored."""
        positions = torch.arange(self.input_ids.numel())
        labels = torch.full_like(positions, IGNORE_INDEX).scatter(0, self.positions, self.labels)
        return replace(self, positions=positions, labels=labels)

    def pin_memory(self) -> "MicroBatch":
        input_ids, positions, labels = (tensor.pin_memory() for tensor in (self.input_ids, self.positions, self.labels))
        return replace(self, input_ids=input_ids, positions=positions, labels=labels)

    def to(self, device: torch.device) -> "MicroBatch":
        """With what models take on `device`, copied while it computes if pinned; keys stay on the host."""
        moved = (tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.positions, self.labels))
        input_ids, positions, labels = moved
        return replace(self, input_ids=input_ids, positions=positions, labels=labels)


class MaskedBatches(RowBatches):
    """Optimizer steps of masked rows.

    Args:
        seed: of order and masks.
        mask_fraction: of the positions of a row, see `_mask`.
        mask_seed: of the masks; None: `seed`.
        mask_patterns: epoch e has the masks of epoch e mod this; None: new masks in each epoch.
        others: of `RowBatches`.

    Raises:
        ValueError: an impossible mask fraction, and as `RowBatches`.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        mask_fraction: float,
        mask_seed: int | None = None,
        mask_patterns: int | None = None,
        **others: Any,
    ) -> None:
        check_mask_fraction(mask_fraction, corpus.seq_len)
        super().__init__(corpus, seed=seed, **others)
        self._mask_fraction = mask_fraction
        self._mask_seed, self._mask_patterns = seed if mask_seed is None else mask_seed, mask_patterns

    def _micro_batches(self, rows_BT: np.ndarray, sample_ids_B: np.ndarray, epochs_B: np.ndarray) -> list[MicroBatch]:
        return masked_micro_batches(
            rows_BT,
            sample_ids_B,
            micro_batch_size=self._micro,
            seed=self._mask_seed,
            epoch=epochs_B % self._mask_patterns if self._mask_patterns else epochs_B,
            fraction=self._mask_fraction,
            tokenizer=self._corpus.tokenizer,
        )


def batches(run: Run[Any], corpus: Corpus, **masks: int) -> Iterator[Step]:
    """The run's optimizer steps from where it stands, made ahead in a thread.

    Args:
        masks: `mask_seed` and `mask_patterns` of `MaskedBatches`, where caches have their own.

    Raises:
        ValueError: as `MaskedBatches`.
    """
    return ahead(run, MaskedBatches, corpus, mask_fraction=run.cfg.mask_fraction, **masks)


def masked_micro_batches(
    tokens_BT: np.ndarray,
    sample_ids_B: np.ndarray,
    *,
    micro_batch_size: int,
    seed: int,
    epoch: int | np.ndarray,
    fraction: float,
    tokenizer: "PreTrainedTokenizerFast",
) -> list[MicroBatch]:
    """Masks rows and cuts them into micro-batches of `micro_batch_size` rows; the last may have fewer."""
    input_ids_BT, columns_BK, labels_BK = _mask(
        tokens_BT, sample_ids_B, seed=seed, epoch=epoch, fraction=fraction, tokenizer=tokenizer
    )
    epochs_B = np.broadcast_to(np.int64(epoch), len(tokens_BT)).copy()
    cuts = [slice(start, start + micro_batch_size) for start in range(0, len(tokens_BT), micro_batch_size)]
    return [
        MicroBatch(
            input_ids=torch.from_numpy(input_ids_BT[cut]),
            positions=torch.from_numpy(_flat_positions(columns_BK[cut], tokens_BT.shape[1])),
            labels=torch.from_numpy(labels_BK[cut].reshape(-1)),
            sample_ids=torch.from_numpy(sample_ids_B[cut]),
            epochs=torch.from_numpy(epochs_B[cut]),
        )
        for cut in cuts
    ]


def validation_batches(
    corpus: Corpus, *, micro_batch_size: int, rank: int, world_size: int, mask_fraction: float = 0.15
) -> Iterator[MicroBatch]:
    """This rank's share of the validation rows, with masks that are the same for every run; see `validation_shares`.

    All labels of a row that does not count are `IGNORE_INDEX`. A sample id is the row.
    """
    check_mask_fraction(mask_fraction, corpus.seq_len)
    shares = validation_shares(corpus, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
    for numbers, present in shares:
        (micro,) = masked_micro_batches(
            corpus.validation[numbers],
            numbers,
            micro_batch_size=micro_batch_size,
            seed=VALIDATION_MASK_SEED,
            epoch=0,
            fraction=mask_fraction,
            tokenizer=corpus.tokenizer,
        )
        micro.labels.view(len(numbers), -1)[torch.from_numpy(~present)] = IGNORE_INDEX
        yield micro
