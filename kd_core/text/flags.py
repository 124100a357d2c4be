"""The flags of text."""

from typing import TYPE_CHECKING, Any

from kd_core.cli import check_flag
from kd_core.text.corpus import MIN_SEQ_LEN
from kd_core.text.masking import check_mask_fraction

if TYPE_CHECKING:
    pass


def check_flags(flags: Any) -> None:
    """Raises ValueError when what a recipe's or a cache's flags say of BERT's samples is impossible."""
    check_flag(flags, "seq_len", MIN_SEQ_LEN <= flags.seq_len <= 512, f"between {MIN_SEQ_LEN} and 512")
    check_mask_fraction(flags.mask_fraction, flags.seq_len)
