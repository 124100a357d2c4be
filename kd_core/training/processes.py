"""How a rank joins the run, and how its process ends.

DeepSpeed is imported inside functions: bad input is refused before those seconds are spent.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from kd_core.launch import die_with_parent, free_port, outlive_readers, started_by_deepspeed
from kd_core.system.ranks import local_rank

T = TypeVar("T")

# A rank that hangs ends the run after this long. DeepSpeed's own setting covers one of its groups only.
COLLECTIVE_TIMEOUT = timedelta(minutes=15)
# The other ranks wait this long at the door while local rank 0 reads and tokenises.
PREPARE_TIMEOUT = timedelta(hours=24)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 2**25  # what mallopt takes


def join(prepare: Callable[[], T]) -> T:
    """Runs `prepare` on every rank and joins the process group; on each node local rank 0 goes first.

    What local rank 0 writes (caches, the run folder) the others find ready. An error there ends the run before any
    rank has joined.
    """
    if started_by_deepspeed():
        die_with_parent()  # a launcher that is killed leaves its ranks running
    if local_rank() == 0:
        result = prepare()
        _init_distributed()
        return result
    _init_distributed()
    return prepare()


def _init_distributed() -> None:
    if "RANK" not in os.environ:  # no launcher: a world of one, without MPI
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
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
    deepspeed.init_distributed(timeout=PREPARE_TIMEOUT, verbose=False)
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
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
