"""Builds the networks of a recipe's `Command:` at full size on the meta device: no data, no weights, no training.

    python tests/recipes/on_meta.py recipes/resnet_kd.py

Prints a line of JSON: of each network that is trained, and of each teacher, parameters and the memory that it takes.
"""

import json
import runpy
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torchvision
from transformers import AutoConfig

from kd_core.images import selection
from kd_core.images.sources import ImageSet
from kd_core.runs import chain
from kd_core.teachers import pool
from kd_core.text import pretrained, probes
from kd_core.training.loop import Run
from tests.conftest import ROOT
from tests.recipes.headers import header, words_of

# What the data of each kind says to a recipe, at full scale.
CLASSES = [str(number) for number in range(1000)]
TOKENS = {"google-bert/bert-base-uncased": 30522, "HuggingFaceTB/SmolLM2-135M": 49152}
# Published configurations of what the headers name on the hub.
SIZES = runpy.run_path(str(ROOT / "kd_core" / "text" / "causal_lm.py"))["SIZES"]
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
SMOLLM = dict(vocab_size=49152, tie_word_embeddings=True)
HUB: dict[str, Any] = {
    "google-bert/bert-large-uncased": ("bert", LARGE),
    "HuggingFaceTB/SmolLM2-360M": ("llama", SMOLLM | SIZES["360M"]),
    "HuggingFaceTB/SmolLM2-1.7B": (
        "llama", SMOLLM | dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, intermediate_size=8192)
    ),
}  # fmt: skip
GIB = 2**30


class Built(BaseException):
    """Everything has been built; not an Exception, so that nothing on the way takes it for a failure."""


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def network(name: str, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Memory in bf16 training without ZeRO: weights and gradients of 2 bytes, a float32 copy, the optimizer's moments."""
    count, moments = parameters(module), 2 if isinstance(optimizer, torch.optim.Adam) else 1
    return {"name": name, "parameters": count, "training_gib": round(count * (2 + 2 + 4 + 4 * moments) / GIB, 3)}


def teacher(name: str, module: torch.nn.Module) -> dict[str, Any]:
    count = parameters(module)
    return {"name": name, "parameters": count, "bf16_gib": round(2 * count / GIB, 3)}


def prepared(run: Run[Any], _: Any) -> tuple[Any, Any]:
    if hasattr(run.cfg, "eval_size"):
        split = MagicMock(pixels=None)
        split.__len__.return_value = 10**6
        return ImageSet("", "", tuple(CLASSES), split, split, split), {}
    columns = TOKENS[getattr(run.cfg, "tokenizer", None) or "google-bert/bert-base-uncased"]
    tokenizer = MagicMock(bos_token_id=1, eos_token_id=2, pad_token_id=0, get_vocab=lambda: {"last": columns - 1})
    tokenizer.__len__.return_value = columns
    data = MagicMock(classes=CLASSES, tokenizer=tokenizer, seq_len=getattr(run.cfg, "seq_len", 0))
    return data, columns if run.recipe == "causal_lm_kd" else {}


def build(recipe: Path) -> dict[str, list[dict[str, Any]]]:
    told: dict[str, list[dict[str, Any]]] = {"trained": [], "teachers": []}

    def engine(_: Run[Any], module: Any, optimizer: Any, name: str = "student", **__: Any) -> Any:
        told["trained"].append(network(name, module, optimizer))
        return MagicMock(module=module)

    def gather(run: Run[Any], load: Any, *_: Any, **__: Any) -> Any:
        told["teachers"] += [teacher(path, load(path)) for path in run.cfg.teachers]
        return MagicMock(known=[{} for _ in run.cfg.teachers])

    def steps(*_: Any, **__: Any) -> Any:
        raise Built

    def first_stage(_: str, __: Any, typed: Sequence[str], stages: Mapping[str, str], preset: str = "") -> int:
        return main([*typed, *shlex.split(next(iter(stages.values())))], preset)

    def of_torchvision(name: str, weights: Any = None, **settings: Any) -> Any:
        return made(name, weights=None, **settings)

    def of_the_hub(model_class: Any, path: str, *_: Any, **settings: Any) -> Any:
        kind, shape = HUB[path]
        return getattr(model_class, "from_config", model_class)(AutoConfig.for_model(kind, **shape))

    made = torchvision.models.get_model
    torchvision.models.get_model = of_torchvision
    Run.prepare, Run.engine, Run.plain_engine, Run.steps = prepared, engine, engine, steps  # type: ignore[method-assign, assignment]
    Run.keep, Run.position, Run.first, Run.complete, pool.gather = MagicMock(), None, 0, 0, gather  # type: ignore[method-assign, misc]
    pretrained.load_pretrained = of_the_hub  # before a recipe's parts are imported, which take it from there
    chain.run, selection.kept = first_stage, MagicMock()
    probes.require_head = probes.require_isolation = MagicMock()  # which read what a model computes
    main = runpy.run_path(str(recipe))["main"]
    main.__globals__["fit"] = MagicMock()  # which asks a teacher about the data
    try:
        with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
            main([*words_of(header(recipe)["Command"]), "--out", f"{folder}/run"])
    except Built:
        return told
    raise AssertionError(f"{recipe}: its command ended before run.steps")


if __name__ == "__main__":
    print(json.dumps(build(Path(sys.argv[1]).resolve())))
