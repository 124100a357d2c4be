"""An iterator that runs ahead in a thread."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(iterator: Iterable[Item], depth: int = 2, *, pin_memory: bool = False) -> Iterator[Item]:
    """Runs an iterator in a background thread, at most `depth` items ahead; its exceptions are raised here.

    Args:
        pin_memory: call `pin_memory()` of each item in the thread, so that copies to a GPU need not wait.
    """
    items: queue.Queue[tuple[str, object]] = queue.Queue(maxsize=depth)
    abandoned = threading.Event()

    def put(kind: str, value: object) -> None:
        while not abandoned.is_set():
            try:
                return items.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in iterator:
                put("item", item.pin_memory() if pin_memory else item)  # type: ignore[attr-defined]
                if abandoned.is_set():
                    return
        except BaseException as error:  # raised again by the consumer, whatever it is
            put("error", error)
        else:
            put("end", None)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise value  # type: ignore[misc]
            yield value  # type: ignore[misc]
    finally:
        abandoned.set()
        thread.join(timeout=1)  # not longer: it may be waiting for a download that nobody needs any more
