"""Random numbers as a pure function of what they are for: no generator to save, none to share between processes."""

import hashlib

import numpy as np
import torch

from kd_core.system.ranks import rank


def splitmix64(x: np.ndarray | np.uint64) -> np.ndarray:
    """One independent-looking 64-bit number for each number. https://prng.di.unimi.it/splitmix64.c"""
    z = np.atleast_1d(x) + np.uint64(0x9E3779B97F4A7C15)  # of arrays, because numpy warns when a scalar wraps around
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seed: int, epochs_B: np.ndarray, ids_B: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each sample, float64 [B, count]: a function of (seed, epoch, id) alone."""
    state_B = splitmix64(splitmix64(splitmix64(np.uint64(seed)) + epochs_B.astype(np.uint64)) + ids_B.astype(np.uint64))
    return (splitmix64(state_B[:, None] + np.arange(count, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53


def seed_step(seed: int, step: int) -> None:
    """Seeds dropout as a pure function of (seed, step, rank): a resumed run needs no saved generator."""
    mixed = hashlib.blake2b(f"{seed},{step},{rank()}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(mixed, "little"))
