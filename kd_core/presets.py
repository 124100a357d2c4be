"""What a launch file runs: its flags for a GPU node, or its small preset and that preset's own teacher elsewhere."""

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from filelock import FileLock

from kd_core import cli, engine
from kd_core.launch import die_with_parent

# What decides how text is read; a teacher is shared by all runs that read the same text in the same way.
TEXT_FIELDS = ("data", "tokenizer", "vocab_size", "seq_len")
UNSET = "the preset's own teacher"


def launch(
    main: Callable[[Sequence[str], str], int],
    config_type: type[cli.SharedFlags],
    *,
    node: str,
    small: str,
    teacher: str,
) -> None:
    """Runs a recipe's `main` with a launch file's flags, over which the command line's win; never returns.

    Args:
        main: the recipe's `main`.
        config_type: the recipe's `Config`.
        node: flags for GPUs; chosen where there is one, or by `--preset node`.
        small: flags for a CPU; chosen where there is no GPU, or by `--preset small`.
        teacher: flags that train the small preset's teacher, for when distillation is on and --teachers names none.
            It is kept under runs/small_teacher/ and shared by later runs.
    """
    with cli.one_line_errors():
        preset, typed = cli.take(sys.argv[1:], "--preset")
        if preset not in (None, "node", "small"):
            raise ValueError(f"--preset must be node or small, got {preset}")
        if preset is None:
            preset = "node" if torch.cuda.is_available() else "small"
            if preset == "small":
                _say("no GPU here: running the small preset of this file (--preset node for the full one)")
        flags = node if preset == "node" else small
        if preset == "small":
            cfg = cli.parse(config_type, typed, f"{small} --teachers {shlex.quote(UNSET)}")
            if cfg.kd_ratio > 0 and cfg.teachers == (UNSET,):
                flags += f" --teachers {shlex.quote(str(_small_teacher(main, teacher, cfg)))}"
    engine.end_process(main(typed, flags))


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def _small_teacher(main: Callable[..., int], flags: str, cfg: cli.SharedFlags) -> Path:
    """The folder of the finished teacher; one process trains it, the other ranks and runs wait for it."""
    words = shlex.split(flags, comments=True)
    for field in TEXT_FIELDS:
        if getattr(cfg, field) is not None:
            words += ["--" + field.replace("_", "-"), str(getattr(cfg, field))]
    folder = Path("runs/small_teacher") / hashlib.sha256(repr(words).encode()).hexdigest()[:8]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "hf").exists():
            _say(f"the small preset's teacher is not there yet: training it into {folder} (minutes, once)")
            words += ["--out", str(folder)] + (["--resume"] if (folder / "run.json").exists() else [])
            # A run of its own, in a world of one.
            alone = {
                k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
            }
            recipe = str(sys.modules[main.__module__].__file__)
            with subprocess.Popen([sys.executable, recipe, *words], env=alone, preexec_fn=die_with_parent) as training:
                try:
                    code = training.wait()
                except BaseException:  # SIGTERM or Ctrl-C: the teacher saves, and the next call resumes it
                    training.terminate()
                    raise
            if not (folder / "hf").exists():
                sys.exit(code or 143)
    return folder
