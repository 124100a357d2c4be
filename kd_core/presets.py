"""What a launch file runs: its flags for a GPU node, or its small preset and that preset's own teacher elsewhere."""

import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from kd_core import cli
from kd_core.launch import die_with_parent
from kd_core.runs import folders
from kd_core.system import ranks
from kd_core.system.files import held
from kd_core.training import engine
from kd_core.training.processes import check_launcher, end_process

# What decides how data is read, by student and teacher alike.
DATA_FIELDS = (
    "data",
    "tokenizer",
    "vocab_size",
    "seq_len",
    "fields",
    "decoded_gib",
    "max_corrupt",
    "on_too_long",
    "chat_template",
)
DATA_SWITCHES = ("packing",)
UNSET = "the preset's own teacher"


def launch(
    main: Callable[[Sequence[str], str], int],
    config_type: type[Any],
    build_data: Callable[[Any], Any],
    *,
    node: str,
    small: str,
    teacher: str,
) -> NoReturn:
    """Runs a recipe's `main` with a launch file's flags, over which the command line's win; ends the process.

    Args:
        main: the recipe's `main`.
        config_type: the recipe's `Config`, of `TeacherFlags` and `TrainFlags`.
        build_data: the recipe's; its fingerprint says which runs can share a teacher.
        node: flags for GPUs; chosen where there is one, or by `--preset node`.
        small: flags for a CPU; chosen where there is no GPU, or by `--preset small`.
        teacher: flags that train the small preset's teacher, for when distillation is on and --teachers names none.
            It is kept under runs/small_teacher/ and shared by later runs.
    """

    def run() -> int:
        with cli.one_line_errors():
            check_launcher()
            preset, typed = cli.take(sys.argv[1:], "--preset")
            if preset not in (None, "node", "small"):
                if preset not in config_type.PRESETS:
                    names = ", ".join(["node", "small", *config_type.PRESETS])
                    raise ValueError(f"--preset must be one of {names}, got {preset}")
                typed, preset = ["--preset", preset, *typed], None
            if preset is None:
                preset = "node" if torch.cuda.is_available() else "small"
                if preset == "small":
                    _say("no GPU here: running the small preset of this file (--preset node for the full one)")
            flags = node if preset == "node" else small
            if preset == "small":
                cfg = cli.parse(config_type, typed, f"{small} --teachers {shlex.quote(UNSET)}")
                if cfg.distils and cfg.teachers == (UNSET,):
                    engine.load_config(cfg)  # what is wrong with the run shows before minutes go into its teacher
                    folders.check_folder(cfg)
                    folder = _teacher_folder(teacher, cfg, build_data)
                    _train_once(folder, main, teacher, cfg)
                    flags += f" --teachers {shlex.quote(str(folder))}"
        return main(typed, flags)

    end_process(run)


def _say(text: str) -> None:
    if ranks.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _teacher_folder(flags: str, cfg: Any, build_data: Callable[[Any], Any]) -> Path:
    """A name that follows from the teacher's flags and from the data, tokenizer included."""
    key = repr((shlex.split(flags, comments=True), build_data(cfg).fingerprint))
    return Path("runs/small_teacher") / hashlib.sha256(key.encode()).hexdigest()[:8]


def _train_once(folder: Path, main: Callable[..., int], flags: str, cfg: Any) -> None:
    """Trains the teacher unless it is there; local rank 0 does it, under a lock, and the other ranks and runs wait."""
    while ranks.local_rank() != 0 and not (folder / "hf").exists():
        time.sleep(0.5)  # should the training fail, the launcher ends this rank
    with held(Path(f"{folder}.lock"), str(folder)):
        if (folder / "hf").exists():
            return
        _say(f"the small preset's teacher is not there yet: training it into {folder} (minutes, once)")
        words = [sys.executable, str(sys.modules[main.__module__].__file__), *shlex.split(flags, comments=True)]
        for field in DATA_FIELDS:
            if (value := getattr(cfg, field, None)) is not None:
                texts = value if isinstance(value, tuple) else (value,)
                words += ["--" + field.replace("_", "-"), *map(str, texts)]
        for switch in DATA_SWITCHES:
            if getattr(cfg, switch, True) is False:
                words += ["--no-" + switch]
        words += ["--out", str(folder)] + (["--resume"] if (folder / "run.json").exists() else [])
        # A run of its own, in a world of one.
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
        with subprocess.Popen(words, env=alone, preexec_fn=die_with_parent) as training:
            try:
                code = training.wait()
            except BaseException:  # SIGTERM or Ctrl-C: the teacher saves, and the next call resumes it
                training.terminate()
                raise
        if not (folder / "hf").exists():
            sys.exit(code or 143)
