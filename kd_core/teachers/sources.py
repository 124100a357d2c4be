"""What --teachers may name, and what is asked of it before a run begins."""

import glob
import os
from pathlib import Path
from typing import Any

from torch import nn

from kd_core.runs.sources import model_source

CACHE_PREFIX = "cache:"  # of a source of --teachers that holds answers
COUNTS_PREFIX = "counts:"  # of one that answers from counts of the training data


def matched(path: str, out: str | None) -> list[str]:
    """What a source of --teachers stands for: itself or, of a pattern, the paths that it matches in their order by name.

    Every rank asks at a moment of its own: so neither the run in `out` nor one that has not finished is matched.
    """
    if not glob.has_magic(path) or Path(path.removeprefix(CACHE_PREFIX)).exists():
        return [path]
    if path.startswith(CACHE_PREFIX):
        raise ValueError(f"--teachers {path}: patterns are for models; name each cache by itself")
    own = Path(out).resolve() if out else None
    found = [name for name in sorted(glob.glob(path)) if not _is_unfinished_run(name)]
    found = [name for name in found if own is None or not Path(name).resolve().is_relative_to(own)]
    if not found:
        raise FileNotFoundError(
            f"--teachers {path} matches nothing that has finished; give paths, names or a pattern such as 'runs/*'"
        )
    return found


def _is_unfinished_run(path: str) -> bool:
    """A folder without `hf/` that has a run.json, or is empty because it is about to get one."""
    names = {name for name in os.listdir(path) if not name.startswith(".")} if os.path.isdir(path) else {"a file"}
    return not names or ("run.json" in names and "hf" not in names)


class CachedTeacher(nn.Module):
    """A teacher that is called with the keys of samples and the temperature, instead of the samples."""

    score: dict[str, float]  # its model's evaluation, which the manifest recorded
    fingerprint: dict[str, Any]  # the header, without the name that the teacher went by


def cache_folder(source: str) -> Path | None:
    """The folder of a source of --teachers that is a cache, else None."""
    return Path(source.removeprefix(CACHE_PREFIX)) if source.startswith(CACHE_PREFIX) else None


def counted(source: str) -> str:
    """The name of a source of --teachers that no model is behind; empty for others."""
    return source.removeprefix(COUNTS_PREFIX) if source.startswith(COUNTS_PREFIX) else ""


def is_model(source: str) -> bool:
    return not source.startswith((CACHE_PREFIX, COUNTS_PREFIX))


def source_of(path: str) -> str:
    """What `path` of --teachers names: of what is no model itself, else a `model_source`."""
    return model_source(path) if is_model(path) else path
