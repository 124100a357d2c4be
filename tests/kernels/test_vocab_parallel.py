"""Columns spread over 3 ranks give the values and gradients of the whole."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, cpu_environment, free_port

WORKER = Path(__file__).with_name("vocab_parallel_worker.py")


def test_equals_the_whole() -> None:
    port, ranks = str(free_port()), 3
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "torch"],
            env=cpu_environment(
                RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PYTHONPATH=str(ROOT)
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
