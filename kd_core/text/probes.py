"""What is tried on a causal language model before it trains or teaches: its logits, and that no document sees another.

Models are `causal_lm.CausalLM`s on the CPU, called as a run calls them.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

# Shares of the root mean square. Nothing of the first document may reach the second: with the same shapes its hidden states
# are the same to the bit. Alone they may differ by rounding, in bf16 by at most a few percent; a leak is tens of percent.
LEAK, ROUNDING = 1e-3, 0.1
# The same hidden states give the same logits, scaled and capped in another order at most.
OTHER_LOGITS = 0.02


@torch.no_grad()
def require_head(model: Any, what: str) -> None:
    """
    Raises:
        ValueError: the model's own logits are not those of its output layer, with the scale and soft cap of its config; or it
            takes no positions.
    """
    if "position_ids" not in inspect.signature(model.lm.base_model.forward).parameters:
        raise ValueError(
            f"{what} ({type(model.lm).__name__}) takes no position_ids, by which documents begin; choose another model"
        )
    if not isinstance(model.head, nn.Linear):
        raise ValueError(f"{what} has no linear layer that makes its logits; choose another model")
    input_ids, position_ids = _document(model, 8, seed=0)
    was_training = model.training
    model.eval()
    own = model.lm(input_ids, position_ids=position_ids, use_cache=False).logits[0]
    ours = model(input_ids, position_ids, None, torch.arange(8))
    model.train(was_training)
    if _distance(ours, own) > OTHER_LOGITS:
        raise ValueError(
            f"{what} ({type(model.lm).__name__}) makes its logits in a way that is not known here: they are off by "
            f"{_distance(ours, own):.0%} from its output layer's; choose another model"
        )


@torch.no_grad()
def require_isolation(model: Any, what: str) -> None:
    """Computes the second document of a packed row alone, inside the row, and behind another first document.

    Raises:
        ValueError: the second document sees the first, or its positions do not restart.
    """
    first, other, second = (_document(model, length, seed) for length, seed in ((20, 1), (20, 2), (12, 3)))
    was_training = model.training
    model.eval()

    def hidden(*documents: tuple[Tensor, Tensor]) -> Tensor:
        input_ids, position_ids = (torch.cat(parts, 1) for parts in zip(*documents, strict=True))
        start = input_ids.shape[1] - second[0].shape[1]
        answer: Tensor = model(input_ids, position_ids, None, torch.arange(start, input_ids.shape[1]), head=False)
        return answer

    inside = hidden(first, second)
    leak, moved = _distance(hidden(other, second), inside), _distance(hidden(second), inside)
    model.train(was_training)
    if leak > LEAK or moved > ROUNDING:
        raise ValueError(
            f"{what} ({type(model.lm).__name__}) lets a document see the one before it in a packed row: its hidden states "
            f"change by {max(leak, moved):.0%}; give --no-packing, or another model"
        )


def _document(model: Any, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens and their positions, [1, length] each."""
    vocabulary = model.lm.get_input_embeddings().weight.shape[0]
    input_ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
    return input_ids, torch.arange(length)[None]


def _distance(a: Tensor, b: Tensor) -> float:
    """Of two tensors, the root mean square of their difference over that of the second."""
    return float(((a.float() - b.float()).square().mean() / b.float().square().mean()).sqrt())
