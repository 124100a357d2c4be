"""What the engine sets for its process."""

import os
import socket
import subprocess
import sys
from unittest import mock

import pytest

from kd_core.training import processes
from tests.conftest import ROOT, cpu_environment

STEPS = """
import resource, torch
from kd_core.training import processes

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        kept = [torch.ones(2**20) for _ in range(4)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
processes._keep_freed_memory()
faults()
print(plain, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_on_a_cpu_freed_memory_serves_the_next_step() -> None:
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert kept < plain / 10


def unlaunched() -> dict[str, str]:
    """The environment without what runs in this process have put there."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RANK", "LOCAL_", "WORLD_", "MASTER_"))
    }


@pytest.mark.parametrize(
    "left_over",
    [
        {},
        {"WORLD_SIZE": "8", "LOCAL_RANK": "3"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "2", "MASTER_ADDR": "gone", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "taken", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    ],
)
def test_what_another_launcher_has_left_behind_makes_no_ranks(left_over: dict[str, str]) -> None:
    with mock.patch.dict(os.environ, unlaunched() | left_over, clear=True):
        processes.check_launcher()
        made = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
        assert made == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        assert os.environ["MASTER_PORT"].isdecimal()
        assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ


def test_ranks_that_could_never_meet_are_refused() -> None:
    two = {"RANK": "0", "WORLD_SIZE": "2"}
    with (
        mock.patch.dict(os.environ, unlaunched() | two, clear=True),
        pytest.raises(ValueError, match="RANK=0 and WORLD_SIZE=2 are set and MASTER_"),
    ):
        processes.check_launcher()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (str(taken.getsockname()[1]), "70000", "a port"):
            there = {**two, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with (
                mock.patch.dict(os.environ, unlaunched() | there, clear=True),
                pytest.raises(ValueError, match=f"port {port} of this machine cannot"),
            ):
                processes.check_launcher()
            with mock.patch.dict(os.environ, unlaunched() | there | {"RANK": "1"}, clear=True):
                processes.check_launcher()
                assert os.environ["LOCAL_RANK"] == "0"
