"""What is said on the terminal."""

import sys


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
