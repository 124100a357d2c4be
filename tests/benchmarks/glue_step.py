"""What a fine-tuning step of the GLUE recipe costs against a bare PyTorch loop, and what several jobs at a time save.

    ./launch/bench.sh glue MODEL GLUE_FOLDER [--task SST-2] [--rounds 9] [--steps 40]

Step: one process, the recipe's own functions and the bare loop in turns, each on its own copy of the model, with the same
batches from the same tokens. Jobs: the same four jobs one at a time and --jobs at a time, start-up included.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from kd_core.glue import models
from kd_core.glue import tasks as glue
from kd_core.glue.plan import FineTuning
from kd_core.runs.sources import model_source
from kd_core.system import ranks
from kd_core.text.tokenizer import load_tokenizer
from recipes import glue as recipe

SETTINGS = {"lr": 4e-5, "weight_decay": 0.0, "batch_size": 16, "epochs": 99, "max_length": 128}


def bare_step(model: Any, optimizer: Any, examples: list[tuple[torch.Tensor, int]]) -> None:
    """The step that one writes without this project: pad, mask, forward, cross-entropy, backward, AdamW."""
    ids = pad_sequence([tokens for tokens, _ in examples], batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens, _ in examples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    labels = torch.tensor([label for _, label in examples])
    ids, mask, labels = (tensor.to(ranks.device(), non_blocking=True) for tensor in (ids, mask, labels))
    with torch.autocast(ranks.device().type, torch.bfloat16, enabled=torch.cuda.is_available()):
        logits = model(input_ids=ids, attention_mask=mask).logits
    F.cross_entropy(logits.float(), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=4e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0, fused=True)


def timed(step: Callable[[torch.Tensor], None], batches: list[torch.Tensor]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    for rows in batches:
        step(rows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def steps(source: str, folder: str, task_name: str, rounds: int, number: int) -> None:
    task = glue.TASKS[task_name]
    data = glue.tokenise(task, folder, load_tokenizer(source), 128)
    fields: dict[str, Any] = {"dropout": 0.1, "teacher": None, "kd_ratio": 0.0, "temperature": 1.0, "compile": False}
    fields |= {"teacher_weights": "", "after": None}
    fields |= {"schedule": "cosine", "warmup_fraction": 0.1, "precision": "auto", "tokenizer": source}
    job = FineTuning(
        out="",
        model=source,
        weights="",
        task=task_name,
        seed=1,
        data=data,
        settings=SETTINGS,
        keep_model=False,
        **fields,
    )
    train = glue.examples(data)["train"]
    texts = train.tokens.long().split(train.lengths.tolist())
    pairs = list(zip(texts, train.labels.long().tolist(), strict=True))
    ours = models.build_student(job, task).train()
    bare = copy.deepcopy(ours)
    optimizers = adamw(ours), adamw(bare)

    def recipe_step(rows: torch.Tensor) -> None:
        ours.train()
        sums = recipe.batch_losses(job, task, ours, train, rows, None)
        (sums[0] / len(rows)).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def plain_step(rows: torch.Tensor) -> None:
        bare_step(bare, optimizers[1], [pairs[row] for row in rows.tolist()])

    batches: Iterator[torch.Tensor] = recipe.batches(job, train)
    ratios = []
    for index in range(rounds + 1):
        mine = [next(batches) for _ in range(number)]
        order = (recipe_step, plain_step) if index % 2 else (plain_step, recipe_step)
        seconds = {step: timed(step, mine) for step in order}
        if index:  # the first warms up
            ratios.append(seconds[plain_step] / seconds[recipe_step])
    print("| step | throughput, recipe / bare loop: median (smallest to largest) | rounds of steps |\n|---|---|---|")
    print(
        f"| {task_name} | {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | {rounds} of {number} |"
    )


def several(source: str, folder: str, jobs: int, epochs: int) -> None:
    seconds: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as out:
        for at_once in (1, jobs, jobs, 1):
            command = [sys.executable, str(recipe.__file__), f"m={source}", "--data", folder, "--protocol", "sane"]
            command += ["--tasks", "WNLI", "--seeds", "4", "--epochs", str(epochs), "--jobs", str(at_once)]
            began = time.perf_counter()
            env = dict(os.environ, OMP_NUM_THREADS="1")
            name = f"{out}/{at_once}-{len(seconds)}"
            subprocess.run([*command, "--out", name], check=True, env=env, capture_output=True)
            seconds.setdefault(at_once, []).append(time.perf_counter() - began)
            assert len(json.loads(Path(name, "glue.json").read_text())["models"]["m"]["tasks"]["WNLI"]["seeds"]) == 4
    one, many = (sum(seconds[at_once]) for at_once in (1, jobs))
    print(f"\nfour jobs on WNLI, {jobs} at a time: {one / many:.2f} times sooner than one after another")


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch/bench.sh glue", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="run folder or Hugging Face folder")
    parser.add_argument("folder", help="GLUE in its original layout")
    parser.add_argument("--task", default="SST-2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5, help="of the four jobs on WNLI; 0 leaves them out")
    args = parser.parse_args()
    source = str(Path(model_source(args.model, "model")).resolve())
    steps(source, args.folder, args.task, args.rounds, args.steps)
    if args.epochs:
        several(source, args.folder, args.jobs, args.epochs)


if __name__ == "__main__":
    main()
