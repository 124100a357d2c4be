"""Shared fixtures: a free port and DeepSpeed launches on the CPU, the real data sets, skips with a reason."""

import io
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]


def fuse_multiply_add() -> None:
    """Has Triton's interpreter round a multiply-add once, as GPUs do and as it does itself from 3.9 on."""
    import triton
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data  # of float32 and shorter
        return TensorHandle((exact + z.data).astype(z.data.dtype), z.dtype.scalar)

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        InterpreterBuilder.create_fma = create_fma


# Without a GPU, Triton's kernels run in its interpreter, which has to be known before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    fuse_multiply_add()

# Real data sets: $KD_DATA, or shared/data beside the repository.
DATA = Path(os.environ.get("KD_DATA", ROOT.parent / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("multigpu") and torch.cuda.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA GPUs"))


def photo(seed: int, width: int = 40, height: int = 32) -> bytes:
    """A smooth random JPEG."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "jpeg", quality=95)
    return file.getvalue()


def photo_folder(root: Path, classes: Sequence[str], **counts: int) -> Path:
    """Random images `<split>/<class>/<number>.jpg`, of each class as many as the split is given."""
    for split, count in counts.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                file = root / split / name / f"{number}.jpg"
                file.write_bytes(photo(100 * label + number + 50 * (split == "val")))
    return root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_environment(**extra: str) -> dict[str, str]:
    """The environment of a CPU run outside any launcher, one thread a rank, without Triton's interpreter."""
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    base = {name: value for name, value in os.environ.items() if name not in left_out}
    return base | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | extra


def deepspeed(
    ranks: int, *words: str, cwd: Path | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs a script under DeepSpeed's launcher on `ranks` CPU ranks."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port()), *words]
    return subprocess.run(command, cwd=cwd, env=cpu_environment(), capture_output=True, text=True, timeout=timeout)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))]
        )
        return result
