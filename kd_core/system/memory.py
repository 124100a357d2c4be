"""Memory that allocators keep although nothing uses it."""

import ctypes
import sys

import torch


def give_back() -> None:
    """Returns what is free to the device or, without a GPU, to the operating system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory otherwise
        if trim is not None:
            trim(0)
