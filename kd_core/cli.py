"""Command line: a frozen dataclass becomes flags, and what a user got wrong becomes one line and exit code 2."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import tyro

from kd_core.teachers.samplers import Sampler
from kd_core.teachers.sources import CACHE_PREFIX, matched

ConfigT = TypeVar("ConfigT", bound="SharedFlags")
FlagsT = TypeVar("FlagsT", bound=Any)


@dataclasses.dataclass(frozen=True)
class SharedFlags:
    """The flags that all recipes share; a recipe's Config adds its own and sets its defaults."""

    out: str | None = None
    """Run folder; default runs/<recipe>/<next free number>."""
    resume: bool = False
    """Continue the run in --out from its newest complete checkpoint, exactly."""
    teachers: tuple[str, ...] = ()
    """Models to distil from: run folders, Hugging Face folders or hub names."""
    kd_ratio: float = 0.0
    """Weight of the teacher term inside the window, in [0, 1]; the labels get the rest."""
    temperature: float = 1.0
    """tau > 0; divides the logits of teacher and student in the teacher term."""
    kd_ratio_stop: float | None = None
    """The ratio at the end of the window, towards which it goes along --kd-ramp; default: constant."""
    temperature_stop: float | None = None
    """The temperature at the end of the window, towards which it goes along --kd-ramp; default: constant."""
    kd_ramp: Literal["linear", "cosine"] = "linear"
    """How --kd-ratio-stop and --temperature-stop are reached over the window."""
    kd_every: int = 1
    """Inside the window, distil on every so many-th step; the steps between have the weights of those outside."""
    kd_start: float = 0.0
    """Start of the window, as a fraction of --steps."""
    kd_stop: float = 1.0
    """End of the window, as a fraction of --steps; after it the teachers' memory is freed."""
    label_weight_outside: float = 1.0
    """Weight of the label loss outside the window; inside it is 1 - kd_ratio."""
    sampler: Sampler = "uniform"
    """Who answers at a step: drawn uniform, weighted or per_rank; round_robin; curriculum, weak to strong; or all."""
    draws: int = 1
    """Teachers a step, without meaning for the sampler all; they answer as an ensemble."""
    teacher_weights: tuple[float, ...] = ()
    """Of weighted and curriculum, one a teacher; default: 1 / perplexity, measured before the first step."""
    ensemble: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged when several teachers answer."""
    teacher_placement: Literal["device", "host", "sharded", "zero3"] = "device"
    """Weights on each GPU; in CPU memory, two of them on the GPU; one teacher a rank (for per_rank); or split by ZeRO-3."""
    teacher_deepspeed_config: str = "teacher_zero3_bf16.json"
    """For --teacher-placement zero3: a file of ds_configs/, or your own."""
    teacher_ahead: bool = False
    """On a GPU, run the teachers one micro-batch ahead on a side stream; the same results."""
    divergence: Literal["forward_kl", "reverse_kl", "mse"] = "forward_kl"
    """forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher); mse: squared error of raw logits."""
    steps: int = 1000
    """Length of the run in optimizer steps; the learning rate is scheduled over it."""
    max_minutes: float | None = None
    """Stop cleanly, with a checkpoint, after this many minutes."""
    global_batch_size: int = 256
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = 32
    """Samples per rank and forward; gradient accumulation follows from the two."""
    lr: float = 5e-4
    """Peak learning rate."""
    warmup_fraction: float = 0.06
    """Linear warm-up, as a fraction of --steps."""
    clip: float = 0.0
    """Largest global gradient norm; 0 does not clip."""
    deepspeed_config: str = "zero1_bf16.json"
    """A file of ds_configs/, or your own."""
    compile: bool = False
    """torch.compile for student and teachers."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    eval_every: int = 1000
    """Steps between evaluations of the student."""
    log_every: int = 50
    """Steps between lines of the log."""
    seed: int = 17
    """Initialisation, data order, masks, dropout and teacher draws."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}  # flags by the name that --preset takes

    def __post_init__(self) -> None:
        teachers = (found for path in self.teachers for found in matched(path, self.out))
        object.__setattr__(self, "teachers", tuple(teachers))
        whole = "steps save_every keep eval_every log_every global_batch_size micro_batch_size kd_every draws"
        for name in whole.split():
            self.check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("kd_ratio", "kd_ratio_stop", "kd_start", "kd_stop", "warmup_fraction"):
            self.check(name, 0 <= (getattr(self, name) or 0) <= 1, "in [0, 1]")
        for name in ("temperature", "temperature_stop", "lr"):
            value = getattr(self, name)
            self.check(name, value is None or 0 < value < math.inf, "a finite number above 0")
        for name in ("clip", "label_weight_outside"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "a finite number, at least 0")
        self.check(
            "max_minutes", self.max_minutes is None or 0 < self.max_minutes < math.inf, "a finite number above 0"
        )
        self.check("kd_stop", self.kd_stop >= self.kd_start, f"at least --kd-start, {self.kd_start}")
        self.check("kd_ratio", not self.distils or bool(self.teachers), "0 without --teachers (or name a teacher)")
        self.check("seed", self.seed >= 0, "at least 0")
        self._check_pool()

    def _check_pool(self) -> None:
        """What --teachers and the flags beside it must agree on."""
        number, weights = len(self.teachers), self.teacher_weights
        placement, by_rank = self.teacher_placement, self.sampler == "per_rank"
        self.check("teacher_placement", placement != "sharded" or by_rank, "used with --sampler per_rank")
        self.check(
            "teacher_placement", placement in ("device", "sharded") or not self.cached, "device for cached teachers"
        )
        self.check("sampler", placement != "zero3" or not by_rank, "one that all ranks share, for zero3")
        most = 1 if placement == "sharded" else max(1, number)
        self.check("draws", self.draws <= most, f"at most the number of --teachers that a rank has, {most}")
        if weights:
            self.check("teacher_weights", self.sampler in ("weighted", "curriculum"), "given to weighted or curriculum")
            self.check("teacher_weights", len(weights) == number, f"one a teacher, {number}")
            self.check("teacher_weights", all(0 <= weight < math.inf for weight in weights), "finite, at least 0")
            above = sum(weight > 0 for weight in weights)
            self.check("teacher_weights", above >= self.draws, f"above 0 for at least --draws, {self.draws}")

    @property
    def distils(self) -> bool:
        """Whether any teacher is asked in the run."""
        return max(self.kd_ratio, self.kd_ratio_stop or 0) > 0

    @property
    def cached(self) -> bool:
        """Whether a teacher's answers come from a cache."""
        return any(path.startswith(CACHE_PREFIX) for path in self.teachers)

    def check(self, name: str, ok: bool, allowed: str) -> None:
        """`check_flag` of these flags."""
        check_flag(self, name, ok, allowed)


def check_flag(flags: Any, name: str, ok: bool, allowed: str) -> None:
    """Raises ValueError naming the flag, what is allowed and what was given, unless `ok`."""
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {getattr(flags, name)}")


# Flags that --resume may change: where, how long and how often, never what is computed.
FREE_ON_RESUME = frozenset({"out", "resume", "max_minutes", "save_every", "keep", "eval_every", "log_every", "workers"})


@contextlib.contextmanager
def one_line_errors() -> Iterator[contextlib.ExitStack]:
    """Set-up in which what a user can fix (ValueError, OSError) ends the process with one line and exit code 2.

    Yields a stack: what is put on it is undone when the block fails or is interrupted, so nothing half-made stays.
    Local rank 0 speaks first. The others wait: if they met the same error, the launcher has ended them by then.
    KD_VERBOSE=1 in the environment shows the traceback instead, and DeepSpeed's own log.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as undo:
        try:
            yield undo
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except (ValueError, OSError) as error:
            if os.environ.get("KD_VERBOSE"):
                raise
            if os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(10)
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        undo.pop_all()


class OneLineParser(argparse.ArgumentParser):
    """argparse for commands that take more than flags: what it refuses is a ValueError, one line without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists all flags)")


def parse(config_type: type[ConfigT], typed: Sequence[str] | None = None, preset: str = "") -> ConfigT:
    """The run's config: defaults, then a launch file's flags `preset`, then `--preset NAME`, then `typed` flags.

    A launch file may name a preset itself, under its own flags; a typed one replaces that.

    `--load runs/x/run.json` starts from a saved run's config in place of defaults and launch file; so does `--resume`,
    from the run in `--out`.

    Args:
        config_type: a frozen dataclass whose fields are the flags; a string below a field is its help.
        typed: the command line's words, `sys.argv[1:]` when None.
        preset: flags as one text, `#` starting a comment.

    Raises:
        ValueError: an unknown flag (with the nearest known one), a value of the wrong type, a bad saved run.
    """
    words = list(sys.argv[1:] if typed is None else typed)
    # The launcher passes --local_rank=N; LOCAL_RANK in the environment says the same.
    words = [word for word in words if not re.fullmatch(r"--local[-_]rank(=\d+)?", word)]
    load, words = take(words, "--load")
    out, _ = take(words, "--out")
    if load is None and out and "--resume" in words and (Path(out) / "run.json").exists():
        load = str(Path(out) / "run.json")
    over, words = take_preset(config_type, words)
    under, in_file = take_preset(config_type, shlex.split(preset if load is None else "", comments=True))
    flags, words = over or under, _without(in_file, over) + words
    if load is None:
        return read_flags(config_type, words, config_type(**flags))
    saved = _saved_config(load)
    unknown = sorted(set(saved) - {field.name for field in dataclasses.fields(config_type)})
    if unknown:
        raise ValueError(f"{load} has settings that this recipe lacks: {unknown}; use the recipe that wrote it")
    # A loaded run is a starting point, not the same run: its folder is not taken over.
    saved |= {"out": None, "resume": False} | flags
    return read_flags(config_type, words, dataclasses.replace(config_type(), **saved))


def take(words: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The last value of `flag` in `words`, and the words without it."""
    value, rest, waiting = None, [], iter(words)
    for word in waiting:
        if word == flag:
            value = next(waiting, value)
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
        else:
            rest.append(word)
    return value, rest


def _without(words: Sequence[str], fields: Collection[str]) -> list[str]:
    """`words` without the flags that set one of `fields`."""
    kept, dropped = [], False
    for word in words:
        if word.startswith("--"):
            dropped = re.sub("^--(no-)?", "", word.split("=")[0]).replace("-", "_") in fields
        if not dropped:
            kept.append(word)
    return kept


def take_preset(config_type: Any, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The flags of `--preset NAME` in `words`, and the words without it."""
    name, rest = take(words, "--preset")
    presets: dict[str, dict[str, Any]] = getattr(config_type, "PRESETS", {})
    if name is not None and name not in presets:
        raise ValueError(f"--preset must be one of {sorted(presets)}, got {name}")
    return presets.get(name or "", {}), rest


def _saved_config(path: str) -> dict[str, Any]:
    try:
        saved = json.loads(Path(path).read_text())["config"]
        return {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"--load {path} does not exist; give runs/<recipe>/<run>/run.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no run.json of a run ({error!r}); give runs/<recipe>/<run>/run.json") from None


def read_flags(config_type: type[FlagsT], words: list[str], default: FlagsT) -> FlagsT:
    """`words` over the fields of `default`: tyro's parser for any dataclass, its error box reduced to one line.

    Raises:
        ValueError: an unknown flag (with the nearest known one), a value of the wrong type.
    """
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config_type)}
    known |= {flag.replace("--", "--no-", 1) for flag in known} | {"--help", "--load"}
    for word in words:
        flag = word.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)
            raise ValueError(f"unknown flag {word.split('=')[0]}; did you mean {near[0]}? --help lists all flags")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config_type, args=words, default=default)
    except SystemExit as end:
        if end.code == 0:
            raise
    body = [line.strip("│╭╮╰╯─ ") for line in box.getvalue().splitlines()]
    message = " ".join(body[1 : body.index("", 1)] if "" in body[1:] else body[1:])
    message = message.removeprefix(f"Error parsing {config_type.__name__}: ")
    raise ValueError(f"{message} (--help lists all flags)")
