"""Cached answers as logits, of every task: the flags of a build, whole rows or their top k, and the teacher that reads them.

A sample's record holds whole rows in the teacher's compute dtype, exact for every temperature and divergence. The top k
are smaller where rows are long, but hold at the temperatures of the build only, and share the mass beyond them evenly over
the other columns.

Shapes: N rows, V columns, k entries kept, S temperatures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kd_core import cli
from kd_core.cache import records
from kd_core.runs import folders
from kd_core.system import ranks
from kd_core.teachers.sources import CachedTeacher, cache_folder
from kd_core.teachers.window import still_needed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STORED = {"bf16": "<i2", "fp32": "<f4"}  # NumPy has no bfloat16: its bits


@dataclass(frozen=True)
class BuildFlags(cli.Flags):
    """The flags of a build that all tasks share."""

    GROUP: ClassVar[str] = "cache"
    teacher: str = ""
    """The model that answers: a source of the recipe's --teachers."""
    out: str = ""
    """Folder of the cache."""
    teacher_dtype: Literal["bf16", "fp32"] = "bf16"
    """What the teacher computes in, and what is stored."""
    top_k: int = 0
    """Store this many of the largest logits instead of everything; 0: everything."""
    temperatures: tuple[float, ...] = (1.0,)
    """With --top-k: the temperatures at which runs may use the cache."""
    micro_batch_size: int = 32
    """Samples of a forward; as the run's, and answers are the same to the last bit."""

    AGREE: ClassVar[tuple[str, ...]] = ()  # flags that a run must have alike
    SHARED: ClassVar[tuple[str, ...]] = ()  # those that a run takes from its caches

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("micro_batch_size", self.micro_batch_size >= 1, "at least 1")
        self.check("top_k", self.top_k >= 0, "at least 0")
        self.check("temperatures", min(self.temperatures, default=0) > 0, "one or more numbers above 0")

    @property
    def settings(self) -> dict[str, Any]:
        """Of the header: what a run that uses the cache must share, or takes from it."""
        names = (*self.AGREE, *self.SHARED, "top_k")
        return {name: getattr(self, name) for name in names} | {"temperatures": self.temperatures if self.top_k else ()}

    def fields(self, name: str, rows: int, columns: int) -> list[tuple[str, str, tuple[int, int]]]:
        """Of a record with `rows` rows: all `columns` under `name`, or the top k."""
        if not self.top_k:
            return [(name, STORED[self.teacher_dtype], (rows, columns))]
        top, by_temperature = (rows, self.top_k), (rows, len(self.temperatures))
        return [
            ("ids", "<i4", top), ("logits", "<f4", top), ("log_sum_exp", "<f4", by_temperature),
            ("log_tail", "<f4", by_temperature),
        ]  # fmt: skip


def top_k(logits_NV: Tensor, k: int, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """What `BuildFlags.fields` names of the top k."""
    logits_NV = logits_NV.float()
    logits_Nk, ids_Nk = logits_NV.topk(k)
    rest_NV = logits_NV.scatter(1, ids_Nk, -torch.inf)
    log_sum_exp_NS = torch.stack([(logits_NV / tau).logsumexp(-1) for tau in temperatures], -1)
    log_rest_NS = torch.stack([(rest_NV / tau).logsumexp(-1) for tau in temperatures], -1)
    return {
        "ids": ids_Nk.int(),
        "logits": logits_Nk,
        "log_sum_exp": log_sum_exp_NS,
        "log_tail": log_rest_NS - log_sum_exp_NS,
    }


def logits_of_top_k(stored: dict[str, Tensor], place: int, temperature: float, columns: int) -> Tensor:
    """Logits [N, V] whose probabilities at `temperature` are exact for the top k and share the tail evenly."""
    log_probs_Nk = stored["logits"] / temperature - stored["log_sum_exp"][:, place, None]
    log_each_N1 = stored["log_tail"][:, place, None] - math.log(columns - log_probs_Nk.shape[1])
    return temperature * log_each_N1.repeat(1, columns).scatter(1, stored["ids"].long(), log_probs_Nk)


def check(cfg: Any, flags: type[BuildFlags], expected: Mapping[str, Any]) -> dict[str, int]:
    """Checks the caches of `--teachers` against the run, which must agree with them in `expected` and in `flags.AGREE`.

    Returns:
        `flags.SHARED` of the caches, which must have them alike; empty without a cache.

    Raises:
        FileNotFoundError, ValueError: as `records.require`; or top-k answers at a temperature that was not built, or for a
            method that needs raw logits.
    """
    ours = {**expected, **{name: getattr(cfg, name) for name in flags.AGREE}}
    shared: dict[str, int] = {}
    if cfg.resume and not still_needed(cfg):
        answered = [one.get("fingerprint") for one in folders.check_folder(cfg).get("teachers", ())]
        return {name: one[name] for one in answered if isinstance(one, dict) for name in flags.SHARED}
    for folder in filter(None, map(cache_folder, cfg.teachers if cfg.distils else ())):
        header = records.require(folder, ours | shared)
        shared = {name: header[name] for name in flags.SHARED}
        schedule = (getattr(cfg, name, None) for name in ("temperature", "temperature_stop"))
        used = {temperature for temperature in schedule if temperature is not None}
        if header["top_k"] and not (len(used) == 1 and used <= set(header["temperatures"])):
            raise ValueError(
                f"--teachers cache:{folder} holds the top {header['top_k']} at the temperatures {header['temperatures']}, "
                f"the run uses {sorted(used)}; choose one of them, or build a cache of everything (--top-k 0)"
            )
        if header["top_k"] and (getattr(cfg, "divergence", "") == "mse" or cfg.ensemble == "logits"):
            raise ValueError(
                f"--teachers cache:{folder} holds the top {header['top_k']}, which give probabilities but no raw logits: "
                "leave out --divergence mse and --ensemble logits, or build a cache of everything (--top-k 0)"
            )
    return shared


class CachedLogits(CachedTeacher):
    """A teacher whose answers come from a cache that `check` has seen."""

    def __init__(self, folder: Path, columns: int) -> None:
        super().__init__()
        header = records.read_header(folder)
        self.score = records.read_manifest(folder)["score"]
        self.fingerprint = {name: value for name, value in header.items() if name != "teacher"}
        self.dtype, self.is_top_k = DTYPES[header["teacher_dtype"]], bool(header["top_k"])
        self._records = records.Records(folder, records.Layout(**header["layout"]))
        self._temperatures, self._columns = header["temperatures"], columns
        self.head: nn.Module = nn.Identity()  # makes the logits of whole rows

    def forward(self, sample_ids: Tensor, patterns: Tensor, temperature: float) -> Tensor:
        """Logits [N, V] of samples under their patterns, int64 [B] each."""
        records_B = self._records.take(sample_ids.numpy(), patterns.numpy())
        stored = {name: _on_device(records_B[name]) for name in records_B.dtype.names or ()}
        if self.is_top_k:
            return logits_of_top_k(stored, self._temperatures.index(temperature), temperature, self._columns)
        (rows,) = stored.values()
        return self.head(rows.view(self.dtype))


def _on_device(values: np.ndarray) -> Tensor:
    """[B, rows, ...] as [N, ...] on this rank's device, copied while it computes."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).flatten(0, 1)
    return ranks.to_device(tensor.pin_memory() if torch.cuda.is_available() else tensor)[0]
