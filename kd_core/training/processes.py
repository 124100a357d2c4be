"""How a rank joins the run, and how its process ends.

DeepSpeed is imported inside functions: bad input is refused before those seconds are spent.
"""

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from kd_core.cli import told
from kd_core.launch import die_with_parent, free_port, outlive_readers, started_by_launcher
from kd_core.system.ranks import local_rank, rank, world_size
from kd_core.system.terminal import say

T = TypeVar("T")

# A rank that hangs ends the run after this long. DeepSpeed's own setting covers one of its groups only.
COLLECTIVE_TIMEOUT = timedelta(minutes=15)
# The other ranks wait this long at the door while local rank 0 reads and tokenises.
PREPARE_TIMEOUT = timedelta(hours=24)
SECONDS_TO_WONDER = 60.0  # after which they say so

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 2**25  # what mallopt takes


def join(prepare: Callable[[], T]) -> T:
    """Runs `prepare` on every rank and joins the process group; on each node local rank 0 goes first.

    What local rank 0 writes (caches, the run folder) the others find ready. An error there ends the run before any
    rank has joined.
    """
    if started_by_launcher():
        die_with_parent()  # a launcher that is killed leaves its ranks running
    check_launcher()
    if local_rank() == 0:
        result = prepare()
        _init_distributed()
        return result
    _init_distributed()
    return prepare()


def check_launcher() -> None:
    """Completes what a launcher leaves out of the environment, and refuses what would have this process wait for ever.

    Without a launcher it is a world of one, whatever another has left behind, MPI's variables included.

    Raises:
        ValueError: ranks without an address to meet at, or a port that another process has; no /proc, which DeepSpeed reads.
    """
    there = os.environ
    if sys.platform == "linux" and not os.path.exists("/proc/self"):
        raise ValueError("/proc is not there, and DeepSpeed reads it; mount it (mount -t proc proc /proc)")
    if there.get("WORLD_SIZE", "1") == "1" or "RANK" not in there:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        there.update(alone, MASTER_PORT=str(free_port()))
        there.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's, at the port that it had chosen
        return
    there.setdefault("LOCAL_RANK", "0")
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not there.get(name)]
    if lacking:
        raise ValueError(
            f"RANK={rank()} and WORLD_SIZE={world_size()} are set and {lacking[0]} is not: left over from another launcher, "
            "then unset RANK and WORLD_SIZE; else start by deepspeed or torchrun, which set all of them"
        )
    if rank() == 0 and there.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun has taken it for us
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
            try:
                sock.bind(("", int(there["MASTER_PORT"])))
            except (OSError, OverflowError, ValueError) as error:
                raise ValueError(
                    f"port {there['MASTER_PORT']} of this machine cannot be used ({error}), by another run perhaps; "
                    "choose another, deepspeed --master_port N, or start by bash, which finds a free one"
                ) from None


def _init_distributed() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    import deepspeed
    from deepspeed.utils import logger

    if not os.environ.get("KD_VERBOSE"):
        logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # This op serves inference only, but would be compiled here: half a minute, and a compiler needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _keep_freed_memory()
    # A rank may wait here for minutes inside C++, where a Python handler cannot run and a signal would end in its trace.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    others = "the other ranks" if rank() == 0 else f"rank 0 at {os.environ['MASTER_ADDR']}, which reads the data first"
    waits = threading.Timer(SECONDS_TO_WONDER, say, (f"rank {rank()} of {world_size()} waits for {others}",))
    waits.daemon = True
    waits.start()
    deepspeed.init_distributed(timeout=PREPARE_TIMEOUT, verbose=False)
    waits.cancel()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def limit_collectives() -> None:
    """From now on a collective that a rank does not come to ends the run after COLLECTIVE_TIMEOUT."""
    c10d = dist.distributed_c10d
    set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # public since torch 2.15
    for group in list(c10d._world.pg_map):
        set_timeout(COLLECTIVE_TIMEOUT, group)


def _keep_freed_memory() -> None:
    """Has glibc keep what tensors free for the next step's; by default it may give it back, and have it zeroed anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not everywhere
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, -1)


def leave() -> None:
    """Waits for all ranks and closes the process group."""
    dist.barrier()
    dist.destroy_process_group()


def end_process(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and ends the process with its code, without C++ destructors: gloo's sometimes abort, work done.

    A disk that fills up or goes away while training is one line and exit code 1; output that nobody reads is no error.
    """
    outlive_readers()
    try:
        code = main() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except OSError as error:
        if os.environ.get("KD_VERBOSE"):
            raise
        say(f"error: {told(error)}")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
