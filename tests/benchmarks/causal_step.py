"""What a step of the causal language models' recipe costs: against a bare PyTorch loop, with a teacher, on each ZeRO stage.

    ./launch/bench.sh causal                                                         on a GPU: 135M, rows of 2048, bf16
    ./launch/bench.sh causal --student 2x128 --teacher 4x256 --seq-len 128 --micro-batch-size 16 --vocab-size 4096   on a CPU

All variants are built in one process and take turns, so that a machine whose speed drifts slows all alike. The bare loops
have the same model, packed rows of noise, optimizer and clipping; their losses are those of torch on whole logits, the
distilling one's KL by `F.kl_div`. A round times `--steps` steps of each variant; the table gives medians over rounds, and ratios
within each round.

Where trl is installed, its GKD trainer takes part: same models, optimizer, clipping and loss, KL to the teacher alone. It
packs nothing, so beside it the recipe takes its rows of one document. Of a trainer's step `training_step`, clipping and the
optimizer are timed, not its callbacks and log. The losses of the first step are printed.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_core.system import ranks
from kd_core.text import causal, causal_lm
from kd_core.text.batches import Step
from kd_core.text.causal_tokenizer import load_causal_tokenizer
from kd_core.text.order import START
from kd_core.text.packing import BEGINS, LABEL
from kd_core.training.optimizers import decay_groups
from kd_core.training.processes import end_process, join, leave
from recipes.causal_lm_kd import Config, train_step
from tests.benchmarks.bert_step import CUDA, timed
from tests.benchmarks.stepping import Stepper


def noise(cfg: Config, vocab_size: int, documents: int = 4) -> Iterator[Step]:
    """Packed rows of random tokens, so many documents a row."""
    draw = np.random.default_rng(0)
    marks = np.full((cfg.micro_batch_size, cfg.seq_len), LABEL, np.uint8)
    marks[:, :: cfg.seq_len // documents] = BEGINS
    while True:
        micro = causal.batch(draw.integers(vocab_size, size=marks.shape), marks)
        yield Step([micro.pin_memory() if CUDA else micro], len(micro.positions), START)


def build(cfg: Config, student: str, vocab_size: int) -> causal_lm.CausalLM:
    tokenizer: Any = SimpleNamespace(
        bos_token_id=None, eos_token_id=0, pad_token_id=1, get_vocab=lambda: {"last": vocab_size - 1}
    )
    return causal_lm.build(dataclasses.replace(cfg, student=student), tokenizer)


class Bare:
    """The loop that one writes without this project."""

    def __init__(self, cfg: Config, vocab_size: int, teacher: causal_lm.CausalLM | None = None) -> None:
        dtype = torch.bfloat16 if CUDA else torch.float32
        self.cfg, self.teacher = cfg, teacher
        self.model = build(cfg, cfg.student, vocab_size).lm.to(ranks.device(), dtype).train()
        if cfg.compile:
            self.model.compile()
        groups = decay_groups(self.model, cfg.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)

    def step(self, batch: Step) -> None:
        for micro in batch.micro_batches:
            micro = micro.to(ranks.device())
            logits = self._logits(self.model, micro)
            loss = F.cross_entropy(logits, micro.labels.flatten(), reduction="sum")
            if self.teacher is not None:
                with torch.no_grad():
                    targets = self._logits(self.teacher.lm, micro)[micro.positions].log_softmax(-1)
                inputs = logits[micro.positions].log_softmax(-1)
                loss = 0.1 * loss + 0.9 * F.kl_div(inputs, targets, reduction="sum", log_target=True)
            (loss / batch.rows).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @staticmethod
    def _logits(model: Any, micro: Any) -> Tensor:
        logits: Tensor = model(micro.input_ids, position_ids=micro.position_ids, use_cache=False).logits
        return logits.flatten(0, 1).float()


class Trl:
    """A step of trl.experimental.gkd's trainer on text that is there: lmbda 0, beta 0, which is forward KL."""

    def __init__(self, cfg: Config, vocab_size: int, teacher: causal_lm.CausalLM, folder: Path) -> None:
        import datasets
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        dtype = torch.bfloat16 if CUDA else torch.float32
        model = build(cfg, cfg.student, vocab_size).lm.to(ranks.device(), dtype)
        groups = decay_groups(model, cfg.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
        args = GKDConfig(
            str(folder), lmbda=0, beta=0, max_grad_norm=cfg.clip, torch_compile=cfg.compile, bf16=False, use_cpu=not CUDA,
            activation_checkpointing=False, report_to=[], per_device_train_batch_size=cfg.micro_batch_size,
        )  # fmt: skip
        self.trainer = GKDTrainer(
            model, teacher.lm, args, data_collator=lambda rows: rows, processing_class=load_causal_tokenizer("bytes"),
            train_dataset=datasets.Dataset.from_list([{"messages": []}]),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        )  # fmt: skip
        self.model, self.optimizer = self.trainer.accelerator.prepare(model, optimizer)

    def step(self, batch: Step) -> Tensor:
        (micro,) = batch.micro_batches
        labels = micro.input_ids.clone()
        labels[:, 0] = causal.IGNORE_INDEX
        inputs = {"input_ids": micro.input_ids, "attention_mask": torch.ones_like(labels), "labels": labels}
        loss = self.trainer.training_step(self.model, inputs, torch.tensor(batch.rows))
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def stepper(cfg: Config, vocab_size: int, folder: Path, teachers: Sequence[causal_lm.CausalLM] = ()) -> Stepper:
    """The recipe's own step with everything around it."""
    model = build(cfg, cfg.student, vocab_size)
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    ask = causal_lm.head_and_input if cfg.in_chunks(vocab_size) else None
    return Stepper(cfg, folder, train_step, model, optimizer, teachers, columns=vocab_size, ask=ask)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="135M", help="a size by name, or LAYERSxWIDTH")
    parser.add_argument("--teacher", default="360M", help="the same")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--stages", nargs="*", default=["zero1", "zero0", "zero2", "zero3"] if CUDA else ["zero0"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps of a variant in a round")
    parser.add_argument("--cpu-seconds", action="store_true", help="of this process, not of the clock: on a busy CPU")
    args = parser.parse_args()
    now, V = time.process_time if args.cpu_seconds else time.perf_counter, args.vocab_size

    root = Path(tempfile.mkdtemp())
    join(lambda: None)
    base = Config(
        student=args.student, seq_len=args.seq_len, global_batch_size=args.micro_batch_size, compile=CUDA,
        micro_batch_size=args.micro_batch_size, steps=10**6, logits_mib=10**6,
    )  # fmt: skip
    teacher = build(base, args.teacher, V).to(ranks.device(), torch.bfloat16).eval().requires_grad_(False)
    variants: dict[str, Callable[[Step], Any]] = {"bare loop": Bare(base, V).step}
    variants["bare loop, teacher"] = Bare(base, V, teacher).step
    distil = {"teachers": ("teacher",), "kd_ratio": 0.9}
    beside = {"trl GKD": Trl(base, V, teacher, root / "trl").step} if importlib.util.find_spec("trl") else {}
    for stage, mib in itertools.product(args.stages, (0,) if CUDA else (10**6, 0)):
        file = root / f"{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": int(stage[-1])}, "bf16": {"enabled": CUDA}}))
        cfg = dataclasses.replace(base, deepspeed_config=str(file), logits_mib=mib)
        name = f"recipe, {stage}, " + ("logits" if mib else "chunks")
        made = lambda name, models=(), cfg=cfg, **more: (
            stepper(dataclasses.replace(cfg, **more), V, root / name.replace(", ", "-"), models).step
        )
        variants[name] = made(name)
        variants[f"{name}, teacher"] = made(f"{name}, teacher", [teacher], **distil)
        if beside:
            beside[f"{name}, as GKD"] = made(f"{name}, as GKD", [teacher], **distil | {"kd_ratio": 1.0})

    alone = noise(base, V, documents=1)
    if beside:  # warm up: compile, allocate
        first = next(alone)
        losses = {name: float(function(first)) for name, function in beside.items()}
        print("losses of the first step: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    batches_of = dict.fromkeys(variants, noise(base, V)) | dict.fromkeys(beside, alone)
    variants |= beside
    for name, function in variants.items():
        timed(function, batches_of[name], 3, now)
    rounds = [
        {name: timed(function, batches_of[name], args.steps, now) for name, function in variants.items()}
        for _ in range(args.rounds)
    ]
    tokens = args.micro_batch_size * args.seq_len
    print(
        f"\n{args}\n\n| variant | ms/step | tokens/s | time / bare loop, or trl, of its kind (min to max) |\n|---|---|---|---|"
    )
    for name in variants:
        seconds = statistics.median(r[name] for r in rounds)
        bare = "trl GKD" if name in beside else "bare loop, teacher" if name.endswith("teacher") else "bare loop"
        ratios = sorted(r[name] / r[bare] for r in rounds)
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"| {name} | {seconds * 1e3:.1f} | {tokens / seconds:.0f} | {spread} |")
    leave()
    return 0


if __name__ == "__main__":
    end_process(main)
