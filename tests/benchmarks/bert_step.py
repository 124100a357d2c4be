"""What a step of the BERT recipe costs: against a bare PyTorch loop, with teachers, on each ZeRO stage.

    ./launch/bench.sh bert                                                        on a GPU: BERT-base, length 128, bf16
    ./launch/bench.sh bert --student tiny --teachers mini --seq-len 64 --micro-batch-size 64 --vocab-size 4096   on a CPU
    ./launch/bench.sh bert ... --pool 4 --cache DIR     also with a pool of 4 of the first teacher, and with cached answers

All variants are built in one process and take turns, so that a machine whose speed drifts slows all alike. The bare loop
has the same model, batches, optimizer and loss and nothing else: no DeepSpeed, log, clock or checks. A round times
`--steps` steps of each variant; the table gives medians over rounds, and ratios within each round.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kd_core.cache import mlm as cache_mlm
from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.runs import folders
from kd_core.system import ranks
from kd_core.system.ahead import prefetch
from kd_core.text import bert
from kd_core.text import masking as text
from kd_core.text.corpus import Corpus, prepare
from kd_core.training.processes import end_process, join, leave
from recipes.bert_kd import Config, train_step
from tests.benchmarks.stepping import Stepper

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
    layers, width = bert.SIZES[cfg.student]
    body = cfg.seq_len * layers * (24 * width**2 + 4 * cfg.seq_len * width)
    head = round(cfg.mask_fraction * cfg.seq_len) * (2 * width**2 + 2 * width * vocab_size)
    return 3.0 * (body + head)


class Bare:
    """The loop that one writes without this project."""

    def __init__(self, cfg: Config, corpus: Corpus, dtype: torch.dtype) -> None:
        self.cfg, self.valid = cfg, len(corpus.tokenizer)
        self.model: Any = build_model(cfg, self.valid).to(ranks.device(), dtype).train()
        if cfg.compile:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.lr, betas=(0.9, 0.98), fused=True)

    def step(self, batch: text.Step) -> None:
        for micro in batch.micro_batches:
            input_ids, positions, labels = ranks.to_device(micro.input_ids, micro.positions, micro.labels)
            _, label_N = softmax_kl(self.model(input_ids, positions), None, labels, valid_columns=self.valid)
            (label_N.sum() / batch.rows).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_model(cfg: Config, vocab_size: int) -> Any:
    return bert.build(cfg.student, vocab_size, seed=cfg.seed, seq_len=cfg.seq_len, dropout=cfg.dropout)


def stepper(cfg: Config, vocab_size: int, folder: Path, teachers: Sequence[torch.nn.Module] = ()) -> Stepper:
    """The recipe's own step with everything around it."""
    model = build_model(cfg, vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.98), fused=True)
    ask = bert.head_and_input if cfg.fused_head else None
    return Stepper(cfg, folder, train_step, model, optimizer, teachers, columns=vocab_size, ask=ask)


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
    parser.add_argument("--student", default="base", choices=bert.SIZES)
    parser.add_argument("--teachers", nargs="*", default=["base", "large"], choices=bert.SIZES)
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
    V = len(corpus.tokenizer)
    models = {
        size: build_model(dataclasses.replace(base, student=size), V).to(ranks.device(), torch.bfloat16)
        for size in args.teachers
    }
    variants: dict[str, Callable[[text.Step], None]] = {"bare loop": Bare(base, corpus, dtype).step}
    peak: dict[str, float] = {}
    for stage in args.stages:
        file = root / f"{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": int(stage[-1])}, "bf16": {"enabled": CUDA}}))
        cfg = dataclasses.replace(base, deepspeed_config=str(file))
        variants[f"recipe, {stage}"] = stepper(cfg, V, root / stage).step
        if stage == args.stages[0]:
            for size, model in models.items():
                distil = dataclasses.replace(cfg, teachers=(size,), kd_ratio=0.9)
                variants[f"recipe, {stage}, teacher {size}"] = stepper(distil, V, root / size, [model]).step
                if args.fused_head:
                    fused = dataclasses.replace(distil, fused_head=True)
                    variants[f"teacher {size}, fused head"] = stepper(fused, V, root / f"{size}-fused", [model]).step
    sizes = args.teachers[:1] * args.pool
    cfg = dataclasses.replace(cfg, deepspeed_config=str(root / f"{args.stages[0]}.json"))
    many = [build_model(dataclasses.replace(base, student=size), V) for size in sizes]
    many = [model.to(ranks.device(), torch.bfloat16) for model in many]
    for sampler in ("uniform", "all") if sizes else ():
        distil = dataclasses.replace(cfg, teachers=tuple(sizes), kd_ratio=0.9, sampler=sampler)
        name = f"recipe, {args.pool} x teacher {sizes[0]}, {sampler}"
        variants[name] = stepper(distil, V, root / sampler, many).step
    if args.cache:
        answers = cache_mlm.CachedBert(Path(args.cache), V).to(ranks.device())
        distil = dataclasses.replace(cfg, teachers=cached.teachers, kd_ratio=0.9)
        variants["recipe, cached teacher"] = stepper(distil, V, root / "cached", [answers]).step
    for size, model in models.items():

        @torch.no_grad()
        def forward(batch: text.Step, model: Any = model) -> None:
            for micro in batch.micro_batches:
                model(*micro.to(ranks.device()).inputs)

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
