"""What would train silently on a wrong gradient is refused: losses that reach another engine than their own, and ranks whose
backward passes use other parameters of one engine than the rest."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from kd_core.system.ranks import world_size
from kd_core.training.engine import Engine, LoopError
from kd_core.training.plain import PlainEngine

REMEDY = "call the module of `with frozen(engine) as module`, or detach what comes from it"


class Guards:
    """Of the engines of a run. One alone on one rank costs nothing; else a call of Python for each gradient."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}
        self._used: dict[str, set[int]] = {}  # by engine, its parameters that have got a gradient since its last update
        self._gradients: dict[str, int] = {}  # how many they have got in all
        self._backward_of: str | None = None

    def add(self, name: str, engine: Engine) -> None:
        """Takes in an engine of the run."""
        self._engines[name] = engine
        if world_size() > 1:
            self._note_gradients(name)
        if len(self._engines) > 1:  # one alone cannot be reached by another's loss
            for own in list(self._engines) if len(self._engines) == 2 else [name]:
                self._note_gradients(own)
                self._watch_outputs(own)

    def _note_gradients(self, name: str) -> None:
        if name in self._used:
            return
        self._used[name], self._gradients[name] = set(), 0

        def note(index: int, _: Tensor) -> None:
            self._used[name].add(index)
            self._gradients[name] += 1

        for index, parameter in enumerate(self._engines[name].module.parameters()):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(functools.partial(note, index))

    def _watch_outputs(self, name: str) -> None:
        """Another engine's loss must not pass through this one's outputs: DeepSpeed would take it for this one's own."""

        def check(gradient: Tensor) -> Tensor:
            if self._backward_of not in (None, name):
                raise LoopError(
                    f"a loss of the engine {self._backward_of!r} passes through {name!r}, called as an engine; {REMEDY}"
                )
            return gradient

        def watched(output: Any) -> Any:
            if isinstance(output, Tensor) and output.requires_grad:
                output = output.view_as(output)  # or DeepSpeed's own hooks, on the output itself, would come first
                output.register_hook(check)
            return output

        self._engines[name].register_forward_hook(lambda _, __, outputs: tree_map(watched, outputs))

    @contextlib.contextmanager
    def backward(self, name: str) -> Iterator[None]:
        """A backward pass of the engine's, in which no other engine's parameters may get a gradient."""
        before = self._gradients.copy()
        self._backward_of = name
        yield
        self._backward_of = None
        for own, number in before.items():
            if own != name and self._gradients[own] != number:
                raise LoopError(f"a loss of the engine {name!r} has given gradients to {own!r}; {REMEDY}")

    def used(self, name: str) -> bytes:
        """Which parameters have got a gradient since the engine's last update, a bit each; a plain engine may do as it likes."""
        noted = self._used.get(name, ()) if not isinstance(self._engines[name], PlainEngine) else ()
        bits = sum(1 << index for index in noted)
        return bits.to_bytes(bits.bit_length() // 8 + 1, "little")

    def updated(self, name: str) -> None:
        """The engine has taken its step."""
        if name in self._used:
            self._used[name].clear()
