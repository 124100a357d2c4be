"""The command line: python -m kd_core.cache build [flags]; the head of records.py has its forms."""

import sys
from collections.abc import Sequence
from typing import Any

from kd_core import cli
from kd_core.cache import images, mlm
from kd_core.teachers.sources import cache_folder
from kd_core.training.processes import end_process, leave


def main(typed: Sequence[str] | None = None) -> int:
    """`build` with its flags; returns the exit code."""
    with cli.one_line_errors():
        words = [word for word in (sys.argv[1:] if typed is None else typed) if not word.startswith("--local")]
        if words[:1] not in (["build"], ["--help"]):
            raise ValueError(f"python -m kd_core.cache knows one command, build; got {' '.join(words[:1]) or 'none'}")
        kinds: dict[str, Any] = {"images": images, "mlm": mlm}
        kind, words = cli.take(words[1:] or ["--help"], "--kind")
        if (kind or "mlm") not in kinds:
            raise ValueError(f"--kind must be one of {sorted(kinds)}, got {kind}")
        task = kinds[kind or "mlm"]
        preset, words = cli.take_preset(task.BuildFlags, words)
        flags = cli.read_flags(task.BuildFlags, words, task.BuildFlags(**preset))
        flags.check("teacher", bool(flags.teacher) and not cache_folder(flags.teacher), "given, and a model")
        flags.check("out", bool(flags.out), "given")
        task.build(flags)
    leave()
    return 0


if __name__ == "__main__":
    end_process(main)
