"""What names a model: a run folder, a folder of Hugging Face, a name on its hub."""

import functools
import hashlib
import json
from pathlib import Path

from kd_core.runs.folders import EXPORTS, check_files
from kd_core.system.checked import digests, read_json
from kd_core.system.ranks import local_rank

# Files that from_pretrained reads without running code: safetensors, or pickles restricted to tensors.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def model_source(path: str, flag: str = "--teachers") -> str:
    """What `from_pretrained` takes for `path`: a run folder's `hf/`, a Hugging Face folder, or a hub name.

    Raises:
        FileNotFoundError: `path` looks like a path and nothing is there.
        ValueError: a folder that is neither a finished run nor a Hugging Face model.
    """
    folder = Path(path)
    if folder.is_dir():
        if (folder / "run.json").exists():
            if not (folder / "hf" / "config.json").exists():
                raise ValueError(f"{flag} {path} is a run without hf/: it has not finished; continue it with --resume")
            folder = folder / "hf"
        _check_exported(folder.absolute())
        if not (folder / "config.json").exists() or not any((folder / name).exists() for name in WEIGHT_FILES):
            raise ValueError(f"{flag} {path} is no model: expected a run folder, or config.json with model.safetensors")
        for index in folder.glob("*.index.json"):
            for name in read_json(index, weight_map=dict)["weight_map"].values():
                if name != Path(str(name)).name:
                    raise ValueError(f"{flag} {path}: {index.name} names {name!r}, no file of this folder; correct it")
        return str(folder.resolve())
    if folder.exists() or path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1:
        raise FileNotFoundError(
            f"{flag} {path}: no model folder there; give a run folder, a model folder or a hub name"
        )
    return path


def fingerprint(source: str) -> str | None:
    """Of what `model_source` gives: of a folder a digest of its config and weights, as they may be moved; else None."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    names = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    sums = digests(folder, ["config.json", *names])
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


@functools.cache  # asked for several times a start
def _check_exported(folder: Path) -> None:
    """Raises DamagedError when a finished run's model is not as the run left it; local rank 0 looks, the others wait for it."""
    if (folder.parent / "run.json").exists() and folder.name in EXPORTS and local_rank() == 0:
        check_files(folder.parent, read_json(folder.parent / "run.json"), folder.name)
