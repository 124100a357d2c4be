"""Seconds by part of a run."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Stopwatch:
    """Seconds by part of a run, without synchronising: CUDA events are read when they have passed.

    Parts nest: "teacher" and "data" are also counted within "train", "teacher/2" within "teacher". On resume, seconds and
    calls continue from those given.

    On the host a part is what passes meanwhile, whoever works: a thread that makes batches ahead has no core of its own where
    processes are as many as cores, and its work is then counted in the part that runs first in a step, the teacher's if there
    is one, else the student's.
    """

    def __init__(
        self, seconds: dict[str, float], calls: dict[str, int] | None = None, *, compiling: bool = False
    ) -> None:
        self.seconds = {"train": 0.0, "teacher": 0.0, "data": 0.0, **seconds}
        self.calls = dict(calls or {})
        self._cuda = torch.cuda.is_available()
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        # The first steps compile: they are counted at the time of the first step after them.
        self._compiling = 3 if compiling else 0
        self._skipped = 0

    @contextlib.contextmanager
    def part(self, name: str, on_host: bool = False) -> Iterator[None]:
        """Counts the block under `name`; `on_host` measures what the host waits for, such as data."""
        self.calls[name] = self.calls.get(name, 0) + 1
        if self._cuda and not on_host:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - began)

    def read(self, wait: bool = False) -> dict[str, float]:
        """Seconds by part so far; with `wait` the GPU finishes first, otherwise the last step may be missing."""
        if wait and self._cuda:
            torch.cuda.synchronize()
        while self._events and self._events[0][2].query():
            name, start, end = self._events.popleft()
            self._add(name, start.elapsed_time(end) / 1000)
        return dict(self.seconds)

    def _add(self, name: str, seconds: float) -> None:
        if not self._compiling:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds * (1 + self._skipped)
        if name == "train":  # the end of a step: its other parts came before
            self._skipped = self._skipped + 1 if self._compiling else 0
            self._compiling = max(0, self._compiling - 1)
