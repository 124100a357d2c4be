"""The flags of images."""

import math
from typing import Any

import torch

from kd_core.cli import check_flag
from kd_core.images.views import MIN_SIZE


def check_flags(flags: Any) -> None:
    """Raises ValueError when what a recipe's or a cache's flags say of data and views is impossible."""
    for name in ("train_size", "eval_size", "eval_resize"):
        check_flag(flags, name, getattr(flags, name) >= MIN_SIZE, f"at least {MIN_SIZE}")
    check_flag(flags, "eval_size", flags.eval_size <= flags.eval_resize, f"at most --eval-resize, {flags.eval_resize}")
    check_flag(flags, "max_corrupt", 0 <= flags.max_corrupt < 1, "in [0, 1)")
    check_flag(flags, "min_scale", 0 < flags.min_scale <= 1, "in (0, 1]")
    check_flag(flags, "decoded_gib", 0 <= flags.decoded_gib < math.inf, "a finite number, at least 0")
    check_flag(flags, "randaugment", 0 <= flags.randaugment <= 30, "in 0 to 30")
    check_flag(flags, "teacher_size", (flags.teacher_size or MIN_SIZE) >= MIN_SIZE, f"0, or at least {MIN_SIZE}")
    possible = torch.cuda.is_available() and flags.crop == "resized" and not flags.randaugment
    check_flag(
        flags, "decoder", flags.decoder == "cpu" or possible, "cpu without a GPU, or for padded crop or RandAugment"
    )
