"""Command line: a frozen dataclass becomes flags, and what a user got wrong becomes one line and exit code 2.

A recipe's Config is composed of groups, one for each thing that it has: `RunFlags` (kd_core/runs), `TrainFlags` (training),
`TeacherFlags`, `WindowFlags` and `DistillFlags` (teachers), `MaskingFlags`, `ImageFlags` and so on (the modality). Each group
stands beside the code that reads its flags, and checks them itself. Fields are inherited, so the command line, run.json
and `cfg.lr` stay flat.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

import tyro


class Preset(dict[str, Any]):
    """Flags under a name, and what they are for in a line."""

    def __init__(self, about: str, **flags: Any) -> None:
        super().__init__(flags)
        self.about = about


@dataclasses.dataclass(frozen=True)
class Flags:
    """What every set of flags is: presets by name, a heading in --help, and checks that call the next group's."""

    PRESETS: ClassVar[dict[str, Preset]] = {}  # by the name that --preset takes
    GROUP: ClassVar[str] = "recipe"  # what --help calls the fields that a class declares; each class says its own

    def __post_init__(self) -> None:
        """Where the chain of the groups' checks ends."""

    def check(self, name: str, ok: bool, allowed: str) -> None:
        """Raises ValueError naming the flag, what is allowed and what was given, unless `ok`."""
        if not ok:
            raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {getattr(self, name)}")


ConfigT = TypeVar("ConfigT", bound=Flags)

FULL = {errno.ENOSPC, errno.EDQUOT}
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")  # of the shell; tyro's own flags
# Flags that --resume may change: where, how long and how often, never what is computed.
FREE_ON_RESUME = frozenset(
    {"out", "resume", "max_minutes", "grace_seconds", "save_every", "keep", "eval_every", "log_every", "workers"}
)


@contextlib.contextmanager
def one_line_errors() -> Iterator[contextlib.ExitStack]:
    """Set-up in which what a user can fix (ValueError, OSError) ends the process with one line and exit code 2.

    Yields a stack: what is put on it is undone when the block fails or is interrupted, so nothing half-made stays.
    Local rank 0 speaks first. The others wait: if they met the same error, the launcher has ended them by then.
    KD_VERBOSE=1 in the environment shows the traceback instead, and DeepSpeed's own log.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
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
            print(f"error: {told(error)}", file=sys.stderr, flush=True)
            raise SystemExit(1 if getattr(error, "errno", None) in FULL else 2) from None
        undo.pop_all()


def told(error: BaseException) -> str:
    """What an error says, in one line; of a full disk that it does not name, which ones are."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) in FULL and not getattr(error, "filename", None):
        places = [
            os.getcwd(),
            tempfile.gettempdir(),
            *(os.environ.get(name) for name in ("KD_CACHE", "HF_HOME", "HOME")),
        ]
        full = [place for place in places if place and os.path.exists(place) and shutil.disk_usage(place).free < 2**20]
        text += f"; full: {', '.join(full) or 'a disk, or your quota'}; make room there and call again"
    return text


class OneLineParser(argparse.ArgumentParser):
    """argparse for commands that take more than flags: what it refuses is a ValueError, one line without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists all flags)")


def path(text: str) -> Path:
    """What argparse makes of a path: refused when blank, as an unset variable of a shell gives it; ~ is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is blank; give a path, or leave it out")
    return Path(at_home(text))


def at_home(text: str) -> str:
    """`text` with its ~ for the home folder.

    Raises:
        ValueError: there is none, as for a user without HOME or an entry in the password file, or of a user who is not
            known; a folder "~" would be made.
    """
    path = os.path.expanduser(text)
    name = path.partition("/")[0]
    if name == "~" or (name.startswith("~") and not os.path.lexists(name)):
        raise ValueError(f"{text}: the home folder is not known here; give the whole path, or set HOME")
    return path


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
    try:
        return read_flags(config_type, words, dataclasses.replace(config_type(), **saved))
    except ValueError as error:
        raise ValueError(f"{error} (flags that were not given are those of {load})") from None


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
    presets: dict[str, Preset] = getattr(config_type, "PRESETS", {})
    if name is not None and name not in presets:
        raise ValueError(f"--preset must be one of {sorted(presets)}, got {name}")
    return presets.get(name or "", {}), rest


def _saved_config(path: str) -> dict[str, Any]:
    try:
        saved = json.loads(Path(path).read_text())["config"]
        return {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"--load {path} does not exist; give runs/<recipe>/<run>/run.json") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no run.json of a run ({error!r}); give runs/<recipe>/<run>/run.json") from None


def read_flags(config_type: type[ConfigT], words: list[str], default: ConfigT) -> ConfigT:
    """`words` over the fields of `default`: tyro's parser for any dataclass, its error box reduced to one line.

    Raises:
        ValueError: an unknown flag (with the nearest known one), a value of the wrong type.
    """
    if {"-h", "--help"}.intersection(words):
        print_help(config_type, default)
        raise SystemExit(0)
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config_type)}
    known |= {flag.replace("--", "--no-", 1) for flag in known} | {"--load", *COMPLETION}
    for word in words:
        flag = word.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)
            raise ValueError(f"unknown flag {word.split('=')[0]}; did you mean {near[0]}? --help lists all flags")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return _tidy(tyro.cli(config_type, args=words, default=default), default)
    except SystemExit as end:
        if not end.code:
            raise
    body = [line.strip("│╭╮╰╯─ ") for line in box.getvalue().splitlines()]
    message = " ".join(body[1 : body.index("", 1)] if "" in body[1:] else body[1:])
    message = message.removeprefix(f"Error parsing {config_type.__name__}: ")
    raise ValueError(f"{message} (--help lists all flags)")


def _tidy(flags: ConfigT, default: ConfigT) -> ConfigT:
    """`flags` with ~ for the home folder, which a shell leaves in `--out=~/x` and `cache:~/x`.

    Raises:
        ValueError: a text that is blank, as an unset variable of a shell gives it; for a folder it would be the current one.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
        if value != getattr(default, field.name) and any(not text.strip() for text in texts):
            raise ValueError(f"--{field.name.replace('_', '-')} is blank; give a value, or leave the flag out")
        if any("~" in text for text in texts):
            home = tuple(_at_home(text, field.name) if isinstance(text, str) else text for text in texts)
            changed[field.name] = home if isinstance(value, tuple) else home[0]
    return dataclasses.replace(flags, **changed) if changed else flags


def _at_home(text: str, flag: str) -> str:
    kind, path = re.fullmatch(r"(cache:|\w+=)?(.*)", text, re.DOTALL).groups("")  # type: ignore[union-attr]
    try:
        return kind + at_home(path)
    except ValueError as error:
        raise ValueError(f"--{flag.replace('_', '-')} {error}") from None


def print_help(config_type: type[Flags], default: Flags) -> None:
    """The flags in groups, each with the heading of the class that first declares it, their defaults, and the presets."""
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    named: set[str] = set()
    for cls in filter(dataclasses.is_dataclass, reversed(config_type.__mro__)):
        types, told = typing.get_type_hints(cls), _help_of_fields(cls)
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in [name for name in vars(cls).get("__annotations__", ()) if name in fields and name not in named]:
            kind: Any = Annotated[types[name], tyro.conf.arg(help=told.get(name, ""))]
            groups.setdefault(vars(cls).get("GROUP", Flags.GROUP), []).append((name, kind, getattr(default, name)))
            named.add(name)
    boxes = []
    for heading, own in groups.items():
        box: Any = dataclasses.make_dataclass(heading, [(name, kind) for name, kind, _ in own], frozen=True)
        boxes.append((heading, box, dataclasses.field(default=box(*(value for *_, value in own)))))
    presets = "".join(f"\n--preset {name}: {preset.about}" for name, preset in config_type.PRESETS.items())
    about = (
        f"{inspect.getdoc(config_type)}\n{presets}\n\n--load RUN_JSON: the flags of a run, over which those given win."
    )
    whole: Any = tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass("flags", boxes, frozen=True)]  # type: ignore[misc]
    with contextlib.suppress(SystemExit):
        tyro.cli(whole, args=["--help"], description=about)


def _help_of_fields(cls: type[Any]) -> dict[str, str]:
    """The strings that stand below the fields of a class; none where its source is not at hand."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }  # fmt: skip
