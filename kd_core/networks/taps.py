"""What a network computes on its way: outputs of named layers, for losses on features."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def features(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Within, a forward of `model` leaves the outputs of the layers `names` in the dictionary that is yielded.

        with features(student.module, ["net.layer2"]) as taken:
            logits = student(pixels)
        hint = taken["net.layer2"]

    Of several forwards the last one's stay. The hooks are gone at the end.

    Args:
        model: a module; of an engine its `module`, which a call of the engine passes through.
        names: as in `model.named_modules()`.

    Raises:
        ValueError: the model has no layer of a name.
        RuntimeError: at the end, a layer that no forward has passed; torch.compile leaves out hooks too.
    """
    layers, taken = dict(model.named_modules()), dict[str, Any]()
    for name in names:
        if name not in layers:
            near = [one for one in layers if one.endswith("." + name)] or [one for one in layers if one.count(".") < 2][
                1:
            ]
            raise ValueError(f"{type(model).__name__} has no layer {name!r}; it has {', '.join(near)}")

    def keep(name: str) -> Any:
        return lambda _, __, output: taken.__setitem__(name, output)

    with contextlib.ExitStack() as hooks:
        for name in names:
            hooks.callback(layers[name].register_forward_hook(keep(name)).remove)
        yield taken
    if missed := [name for name in names if name not in taken]:
        raise RuntimeError(
            f"no forward has passed the layer {missed[0]!r}; is the model compiled, or another one called?"
        )


def head(model: nn.Module) -> nn.Linear:
    """The last linear layer of a classifier.

    Raises:
        ValueError: there is none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer, whose input would be its embedding")
    return layers[-1]


def embed(model: nn.Module, *inputs: Any) -> tuple[Any, Tensor]:
    """What `model` gives, and its embeddings: what its `head` was given."""
    taken: list[Tensor] = []
    hook = head(model).register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    try:
        output = model(*inputs)
    finally:
        hook.remove()
    return output, taken[-1]


@torch.no_grad()
def embed_evaluated(model: nn.Module, *inputs: Any) -> Tensor:
    """The embeddings of a model in training as it is evaluated, which leaves its running statistics alone."""
    model.eval()
    embeddings = embed(model, *inputs)[1]
    model.train()
    return embeddings
