"""Why to stop, agreed by all ranks."""

import math
import signal
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_core.launch import launcher
from kd_core.system.ranks import device, rank


class StopSignal:
    """Why to stop, agreed by all ranks: the first SIGTERM, SIGINT or SIGHUP of any rank, `max_minutes` of rank 0, or that
    whoever started the ranks is gone, as after a SIGTERM to `deepspeed`, which passes it on to nobody.

    Further signals are ignored, so that the checkpoint can be written. A launcher signals its ranks one after the
    other, and a rank that saved by itself would wait for the others for ever: so the ranks' votes travel with the
    losses, in the one collective of a step that the host reads.
    """

    REASONS = ("SIGTERM", "SIGINT", "max-minutes", "SIGHUP", "launcher-gone")

    def __init__(self, max_minutes: float | None = None, began: float | None = None) -> None:
        self.agreed = ""
        self._mine = ""
        began = time.monotonic() if began is None else began
        self._deadline = began + 60 * max_minutes if max_minutes and rank() == 0 else math.inf
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)
        self._launcher = launcher()
        self._looked = time.monotonic()

    def _note(self, number: int, _: object) -> None:
        self._mine = self._mine or signal.Signals(number).name

    def votes(self) -> Tensor:
        """float [R]: this rank's vote for each of the R reasons."""
        if time.monotonic() > self._deadline:
            self._mine = self._mine or "max-minutes"
        if self._launcher and time.monotonic() > self._looked + 1:
            self._looked = time.monotonic()
            if launcher() != self._launcher:
                self._mine = self._mine or "launcher-gone"
        votes = torch.zeros(len(self.REASONS), device=device())
        if self._mine:
            votes[self.REASONS.index(self._mine)] = 1
        return votes

    def count(self, votes: Sequence[float]) -> None:
        """Takes the sum of all ranks' votes; from then on `agreed` is the reason, "" while there is none."""
        self.agreed = next((reason for reason, vote in zip(self.REASONS, votes, strict=True) if vote), "")
