"""Memory that allocators keep although nothing uses it, and the most that was used."""

import ctypes
import resource
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


def peak_gib() -> float:
    """The most that this process has held, GiB: tensors on its GPU or, without one, all of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    unit = 1 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)
