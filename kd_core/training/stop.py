"""Why to stop, agreed by all ranks; looked at between steps, and within those and evaluations that take long."""

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from kd_core.launch import GRACE_SECONDS, launcher, pause_launcher
from kd_core.system.ranks import device, rank, total, world_size
from kd_core.system.terminal import say

T = TypeVar("T")

LOOK_SECONDS = 5.0  # between two looks within a step or an evaluation: each is a collective that the host waits for


class Interrupted(Exception):
    """All ranks have agreed to stop, between two batches of a step or of an evaluation."""


@dataclasses.dataclass
class Pace:
    """After how many batches to look next: what takes about LOOK_SECONDS by the mean of all ranks, so equal on all.

    Args:
        every: batches between two looks, until it is known how long they take.
    """

    every: float
    batches: int = 0
    took: float = 0.0  # seconds of one of the last batches, the GPU's work included
    _longest: int = 0
    _since: float = 0.0

    def begin(self) -> None:
        self._longest = max(self._longest, self.batches)
        self.batches, self._since = 0, time.monotonic()

    @property
    def looks_within(self) -> bool:
        """Whether steps are so long that there is a look within."""
        return self.every <= self._longest

    @property
    def seconds(self) -> float:
        """Of a batch; on a GPU the batches since the last look may still be going on, so those before them count too."""
        return max(self.took, (time.monotonic() - self._since) / max(1, self.batches))

    def looked(self, seconds: float) -> None:
        """The host has waited for the device, and `seconds` is the mean of all ranks."""
        self.took = (time.monotonic() - self._since) / max(1, self.batches)
        self.every = max(1, LOOK_SECONDS // max(seconds, 1e-6))
        self.begin()


class StopSignal:
    """Why to stop, agreed by all ranks: the first SIGTERM, SIGINT or SIGHUP of any rank, `max_minutes` of rank 0, or that
    whoever started the ranks is gone, as after a SIGTERM to `deepspeed`, which passes it on to nobody.

    Further signals are ignored, so that the checkpoint can be written. A launcher signals its ranks one after the
    other, and a rank that saved by itself would wait for the others for ever: so the ranks' votes travel with the
    losses, in the one collective of a step that the host reads, and in one of their own where that takes long.

    A run that has not ended `grace` seconds after the first signal, because something hangs, says what is lost and ends.

    Attributes:
        taken, saved: the steps taken, and those of the newest checkpoint.
        pace, evaluation: of the micro-batches of a step, and of the batches of an evaluation.
    """

    REASONS = ("SIGTERM", "SIGINT", "max-minutes", "SIGHUP", "launcher-gone")
    current: ClassVar["StopSignal | None"] = None  # a process has one set of signals, and one run

    def __init__(
        self, max_minutes: float | None = None, began: float | None = None, grace: float = GRACE_SECONDS
    ) -> None:
        self.agreed = ""
        self.taken = self.saved = 0
        self.pace, self.evaluation = Pace(math.inf), Pace(1)
        self._mine = ""
        began = time.monotonic() if began is None else began
        self._deadline = began + 60 * max_minutes if max_minutes and rank() == 0 else math.inf
        self._launcher = launcher()
        self._looked = time.monotonic()
        # What is written there by the signal itself is read while this thread is inside C++, where no handler runs.
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._end_after, args=(read, grace), daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)
        StopSignal.current = self

    def _note(self, number: int, _: object) -> None:
        self._mine = self._mine or signal.Signals(number).name

    def _end_after(self, wakeup: int, grace: float) -> None:
        number = 0
        while number not in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            number = os.read(wakeup, 1)[0]
        with pause_launcher() if self._launcher else contextlib.nullcontext():
            time.sleep(grace)
        if rank() == 0:
            lost = f"steps {self.saved + 1} to {self.taken} are lost" if self.taken > self.saved else "no step is lost"
            say(
                f"error: {signal.Signals(number).name} came {grace:g} s ago (--grace-seconds) and the run could not save: "
                f"{lost}; continue with --resume"
            )
        os._exit(128 + number)

    def votes(self, pace: Pace | None = None) -> Tensor:
        """float [R + 1]: this rank's vote for each of the R reasons, and its seconds a batch."""
        if time.monotonic() > self._deadline:
            self._mine = self._mine or "max-minutes"
        if self._launcher and time.monotonic() > self._looked + 1:
            self._looked = time.monotonic()
            if launcher() != self._launcher:
                self._mine = self._mine or "launcher-gone"
        votes = torch.zeros(len(self.REASONS) + 1, device=device())
        if self._mine:
            votes[self.REASONS.index(self._mine)] = 1
        votes[-1] = (pace or self.pace).seconds
        return votes

    def count(self, votes: Sequence[float], pace: Pace | None = None) -> None:
        """Takes the sum of all ranks' votes; from then on `agreed` is the reason, "" while there is none."""
        *reasons, seconds = votes
        self.agreed = next((reason for reason, vote in zip(self.REASONS, reasons, strict=True) if vote), "")
        (pace or self.pace).looked(seconds / world_size())

    def look(self, pace: Pace | None = None) -> bool:
        """Whether all ranks have agreed to stop; to be called after each batch, on every rank alike."""
        pace = pace or self.pace
        pace.batches += 1
        if pace.batches < pace.every:
            return False
        self.count(total(self.votes(pace)).tolist(), pace)
        return bool(self.agreed)


def interruptible(batches: Iterable[T]) -> Iterator[T]:
    """The batches of an evaluation, as many on every rank, until a signal: then the run saves, and evaluates when it is resumed.

    Raises:
        Interrupted: all ranks have agreed to stop; `Run.steps` takes it. Never before the first step.
    """
    stop = StopSignal.current
    if stop:
        stop.evaluation.begin()
    for batch in batches:
        yield batch
        if stop and stop.look(stop.evaluation):
            raise Interrupted
