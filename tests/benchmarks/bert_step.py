"""What a step of the BERT recipe costs: against a bare PyTorch loop, with teachers, on each ZeRO stage.

    ./launch/bench.sh bert                                                        on a GPU: BERT-base, length 128, bf16
    ./launch/bench.sh bert --student tiny --teachers mini --seq-len 64 --micro-batch-size 64 --vocab-size 4096   on a CPU
    ./launch/bench.sh bert ... --pool 4 --cache DIR     also with a pool of 4 of the first teacher, and with cached answers

All variants are built in one process and take turns, so that a machine whose speed drifts slows all alike. The bare loop
has the same model, batches, optimizer and loss and nothing else: no DeepSpeed, log, clock or checks. A round times
`--steps` steps of each variant; the table gives medians over rounds, and ratios within each round.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kd_core.cache import mlm as cache_mlm
from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.runs import folders
from kd_core.runs import record as report
from kd_core.system import ranks
from kd_core.system.ahead import prefetch
from kd_core.system.clock import Stopwatch
from kd_core.teachers import pool as teachers
from kd_core.text import masking as text
from kd_core.text.corpus import Corpus, prepare
from kd_core.training import engine
from kd_core.training.processes import end_process, join, leave
from kd_core.training.stop import StopSignal
from recipes.bert_kd import RECIPE, SIZES, Config, build_student, train_step

CUDA = torch.cuda.is_available()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def matmul_peak_tflops(size: int = 8192) -> float:
    """bf16 matmul of this device, TFLOP/s; the best of 5."""
    a = torch.randn(size, size, device=ranks.device(), dtype=torch.bfloat16)
    seconds = []
    for _ in range(6):
        synchronize()
        began = time.perf_counter()
        a @ a
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:]) / 1e12


def step_flops(cfg: Config, vocab_size: int) -> float:
    """Floating-point operations of one training sample: 3 times the forward's matmuls, the head at masked positions."""
    layers, width = SIZES[cfg.student]
    body = cfg.seq_len * layers * (24 * width**2 + 4 * cfg.seq_len * width)
    head = round(cfg.mask_fraction * cfg.seq_len) * (2 * width**2 + 2 * width * vocab_size)
    return 3.0 * (body + head)


class Bare:
    """The loop that one writes without this project."""

    def __init__(self, cfg: Config, corpus: Corpus, dtype: torch.dtype) -> None:
        self.cfg, self.valid = cfg, len(corpus.tokenizer)
        self.model: Any = build_student(cfg, self.valid).to(ranks.device(), dtype).train()
        if cfg.compile:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.lr, betas=(0.9, 0.98), fused=True)

    def step(self, batch: text.Step) -> None:
        for micro in batch.micro_batches:
            input_ids, positions, labels = ranks.to_device(micro.input_ids, micro.positions, micro.labels)
            _, label_N = softmax_kl(self.model(input_ids, positions), None, labels, valid_columns=self.valid)
            (label_N.sum() / batch.tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Recipe:
    """The recipe's own step with everything around it: normalisation, checks, clock, agreement to stop, log."""

    def __init__(self, cfg: Config, corpus: Corpus, pool: teachers.TeacherPool, folder: Path) -> None:
        self.cfg, self.pool = dataclasses.replace(cfg, out=str(folder)), pool
        model: Any = build_student(cfg, len(corpus.tokenizer))
        if cfg.compile:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.98), fused=True)
        self.student = engine.initialize(model, optimizer, engine.load_config(cfg))
        self.student.train()
        with contextlib.ExitStack() as undo:
            folders.claim_folder(self.cfg, RECIPE, undo)
            undo.pop_all()
        self.run = report.Run(folder, self.cfg)
        self.clock, self.stop, self.count = Stopwatch({}), StopSignal(), 0

    def step(self, batch: text.Step) -> None:
        with self.clock.part("train"):
            line = train_step(self.cfg, self.student, self.pool, batch, self.count, self.clock, self.stop)
        self.count += 1
        self.run.log(line, self.clock, write=self.count % self.cfg.log_every == 0)


def build_pool(sizes: list[str], cfg: Config, vocab_size: int, dtype: torch.dtype) -> teachers.TeacherPool:
    models = [build_student(dataclasses.replace(cfg, student=size), vocab_size) for size in sizes]
    models = [model.to(ranks.device(), dtype) for model in models]
    return teachers.TeacherPool(sizes, models, columns=vocab_size, compiled=cfg.compile)


def timed(
    function: Callable[[text.Step], None], batches: Iterator[text.Step], steps: int, now: Callable[[], float]
) -> float:
    """Seconds a step, by the clock `now`."""
    synchronize()
    began = now()
    for _ in range(steps):
        function(next(batches))
    synchronize()
    return (now() - began) / steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="base", choices=SIZES)
    parser.add_argument("--teachers", nargs="*", default=["base", "large"], choices=SIZES)
    parser.add_argument("--pool", type=int, default=0, help="also a pool of so many of the first teacher")
    parser.add_argument("--cache", help="also the answers in this folder, of the same data, by kd_core.cache")
    parser.add_argument("--fused-head", action="store_true", help="also each teacher with --fused-head")
    parser.add_argument("--micro-batch-size", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--stages", nargs="*", default=["zero1", "zero0", "zero2", "zero3"] if CUDA else ["zero0"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps of a variant in a round")
    parser.add_argument("--cpu-seconds", action="store_true", help="of this process, not of the clock: on a busy CPU")
    parser.add_argument("--out", type=Path, help="append one JSON line")
    args = parser.parse_args()
    now = time.process_time if args.cpu_seconds else time.perf_counter

    dtype = torch.bfloat16 if CUDA else torch.float32
    root = Path(tempfile.mkdtemp())
    base = Config(
        student=args.student,
        seq_len=args.seq_len,
        global_batch_size=args.micro_batch_size,
        micro_batch_size=args.micro_batch_size,
        compile=CUDA,
        dropout=0.0,
        steps=10**6,
        log_every=50,
    )
    corpus = join(lambda: prepare(args.data, tokenizer=None, vocab_size=args.vocab_size, seq_len=args.seq_len))
    cached = dataclasses.replace(base, teachers=(f"cache:{args.cache}",), kd_ratio=0.9) if args.cache else base
    batches = prefetch(
        text.MaskedBatches(
            corpus,
            seed=0,
            global_batch_size=base.global_batch_size,
            micro_batch_size=base.micro_batch_size,
            rank=0,
            world_size=1,
            mask_fraction=base.mask_fraction,
            **cache_mlm.masking(cached, corpus),
        ),
        pin_memory=CUDA,
    )
    pools = {size: build_pool([size], base, len(corpus.tokenizer), torch.bfloat16) for size in args.teachers}
    none = teachers.TeacherPool((), (), columns=len(corpus.tokenizer))

    variants: dict[str, Callable[[text.Step], None]] = {"bare loop": Bare(base, corpus, dtype).step}
    peak: dict[str, float] = {}
    for stage in args.stages:
        file = root / f"{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": int(stage[-1])}, "bf16": {"enabled": CUDA}}))
        cfg = dataclasses.replace(base, deepspeed_config=str(file))
        variants[f"recipe, {stage}"] = Recipe(cfg, corpus, none, root / stage).step
        if stage == args.stages[0]:
            for size, pool in pools.items():
                distil = dataclasses.replace(cfg, teachers=(size,), kd_ratio=0.9)
                variants[f"recipe, {stage}, teacher {size}"] = Recipe(distil, corpus, pool, root / size).step
                if args.fused_head:
                    fused = dataclasses.replace(distil, fused_head=True)
                    variants[f"teacher {size}, fused head"] = Recipe(fused, corpus, pool, root / f"{size}-fused").step
    sizes = args.teachers[:1] * args.pool
    cfg = dataclasses.replace(cfg, deepspeed_config=str(root / f"{args.stages[0]}.json"))
    many = build_pool(sizes, base, len(corpus.tokenizer), torch.bfloat16)
    for sampler in ("uniform", "all") if sizes else ():
        distil = dataclasses.replace(cfg, teachers=tuple(sizes), kd_ratio=0.9, sampler=sampler)
        name = f"recipe, {args.pool} x teacher {sizes[0]}, {sampler}"
        variants[name] = Recipe(distil, corpus, many, root / sampler).step
    if args.cache:
        answers = cache_mlm.CachedBert(Path(args.cache), len(corpus.tokenizer)).to(ranks.device())
        pool = teachers.TeacherPool(cached.teachers, [answers], columns=len(corpus.tokenizer))
        distil = dataclasses.replace(cfg, teachers=cached.teachers, kd_ratio=0.9)
        variants["recipe, cached teacher"] = Recipe(distil, corpus, pool, root / "cached").step
    for size, pool in pools.items():

        def forward(batch: text.Step, pool: teachers.TeacherPool = pool) -> None:
            for micro in batch.micro_batches:
                pool.logits((0,), ranks.to_device(micro.input_ids, micro.positions), 1.0)

        variants[f"teacher {size}, forward alone"] = forward

    for name, function in variants.items():  # warm up: compile, allocate
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        timed(function, batches, 3, now)
        peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if CUDA else float("nan")
    gc.collect()
    rounds = [
        {name: timed(function, batches, args.steps, now) for name, function in variants.items()}
        for _ in range(args.rounds)
    ]
    peak_tflops = matmul_peak_tflops(8192 if CUDA else 2048)
    flops = step_flops(base, len(corpus.tokenizer)) * args.micro_batch_size
    plain = f"recipe, {args.stages[0]}"
    print(f"\n{args}\nbf16 matmul peak measured: {peak_tflops:.1f} TFLOP/s\n")
    print("| variant | ms/step | samples/s | time / bare (min to max) | share of matmul peak | GiB above weights |")
    print("|---|---|---|---|---|---|")
    for name in variants:
        seconds = statistics.median(r[name] for r in rounds)
        ratios = sorted(r[name] / r["bare loop"] for r in rounds)
        share = f"{flops / seconds / 1e12 / peak_tflops:.0%}" if "teacher" not in name else ""
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        rate = args.micro_batch_size / seconds
        print(f"| {name} | {seconds * 1e3:.1f} | {rate:.0f} | {spread} | {share} | {peak[name]:.2f} |")
    for size in args.teachers:
        parts = [r[plain] + r[f"teacher {size}, forward alone"] for r in rounds]
        costs = sorted(r[f"{plain}, teacher {size}"] / part for r, part in zip(rounds, parts, strict=True))
        print(
            f"\nstep with teacher {size} / (step without + teacher forward alone): "
            f"{statistics.median(costs):.3f} ({costs[0]:.3f} to {costs[-1]:.3f})"
        )
    one = f"{plain}, teacher {args.teachers[0]}" if args.teachers else plain
    for name in [name for name in variants if " x teacher " in name or name.endswith(("cached teacher", "fused head"))]:
        for other in (plain, one):
            costs = sorted(r[name] / r[other] for r in rounds)
            print(f"\n{name} / {other}: {statistics.median(costs):.3f} ({costs[0]:.3f} to {costs[-1]:.3f})")
    if args.out:
        head = folders.describe("bench_bert", base)
        with args.out.open("a") as stream:
            stream.write(
                json.dumps({**head, "args": vars(args) | {"out": None}, "rounds": rounds, "peak": peak}) + "\n"
            )
    leave()
    return 0


if __name__ == "__main__":
    end_process(main)
