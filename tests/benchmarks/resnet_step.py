"""What a step of the ResNet recipe costs: against a bare PyTorch loop, with teachers, on ZeRO stages; synthetic images.

    ./launch/bench.sh resnet                                                     on a GPU: ResNet-50 at 224, bf16
    ./launch/bench.sh resnet --student resnet8 --teachers resnet20 --size 32 --classes 10 --micro-batch-size 64   on a CPU
    ./launch/bench.sh resnet ... --data DATA --cache DIR      also with cached answers, of the same padded views

All variants are built in one process and take turns, so that a machine whose speed drifts slows all alike. The bare loop
is torchvision's reference: its own model, channels last, autocast in bf16 on a GPU and float32 on a CPU, SGD, cross-entropy
and nothing else. A round times `--steps` steps of each variant; the table gives medians over rounds and ratios within each.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kd_core.cache import images as cache_images
from kd_core.images import batches as images
from kd_core.images import classifiers, resnets
from kd_core.images import sources as image_sources
from kd_core.system import ranks
from kd_core.training import optimizers
from kd_core.training.processes import end_process, join, leave
from recipes.resnet_kd import Config, train_step
from tests.benchmarks.bert_step import CUDA, timed
from tests.benchmarks.stepping import Stepper


class Bare:
    """The loop that one writes without this project."""

    def __init__(self, cfg: Config, classes: list[str]) -> None:
        net: Any = resnets.build_net(cfg.student, len(classes))
        self.model = resnets.Classifier(net).to(ranks.device()).to(memory_format=torch.channels_last).train()
        if cfg.compile:
            self.model.compile()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=cfg.lr, momentum=cfg.momentum, weight_decay=5e-5)

    def step(self, batch: images.Step) -> None:
        for micro in batch.micro_batches:
            pixels, labels = ranks.to_device(micro.pixels, micro.labels)
            with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
                loss = F.cross_entropy(self.model(pixels), labels)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def stepper(cfg: Config, classes: list[str], folder: Path, teachers: Sequence[torch.nn.Module] = ()) -> Stepper:
    """The recipe's own step with everything around it."""
    model = classifiers.build_student(cfg.student, classes, seed=cfg.seed)
    groups = optimizers.decay_groups(model, cfg.weight_decay)
    optimizer = optimizers.DecoupledSGD(groups, lr=cfg.lr, momentum=cfg.momentum)
    after = resnets.average_batch_norm
    return Stepper(cfg, folder, train_step, model, optimizer, teachers, columns=len(classes), after=after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet50", choices=resnets.NAMES)
    parser.add_argument("--teachers", nargs="*", default=["resnet50", "resnet101"], choices=resnets.NAMES)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--micro-batch-size", type=int, default=256)
    parser.add_argument("--stages", nargs="*", default=["zero1", "zero0", "zero2", "zero3"] if CUDA else ["zero0"])
    parser.add_argument("--data", help="default: noise of --classes and --size")
    parser.add_argument("--cache", help="also the answers in this folder, of the same data, by kd_core.cache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps of a variant in a round")
    parser.add_argument("--cpu-seconds", action="store_true", help="of this process, not of the clock: on a busy CPU")
    args = parser.parse_args()
    now = time.process_time if args.cpu_seconds else time.perf_counter

    root = Path(tempfile.mkdtemp())
    base = Config(
        student=args.student,
        train_size=args.size,
        crop="padded",
        lr=0.01,
        global_batch_size=args.micro_batch_size,
        micro_batch_size=args.micro_batch_size,
        compile=CUDA,
        steps=10**6,
    )
    source = args.data or f"synthetic:{args.classes}x{args.size}"
    data = join(lambda: image_sources.prepare(source, decoded_gib=2, max_corrupt=0))
    classes = list(data.classes)
    dtype = "bf16" if CUDA else "fp32"
    cached = dataclasses.replace(base, teachers=(f"cache:{args.cache}",), kd_ratio=0.9, teacher_dtype=dtype)
    train = images.TrainBatches(
        images.smaller(data.train, base.view), base.view, 10**6, 0, base.global_batch_size, base.micro_batch_size, 0, 1,
        **(cache_images.views(cached, data) if args.cache else {}),
    )  # fmt: skip
    batches: Iterator[images.Step] = images.steps(train, range(train.steps), workers=0)
    models = {}
    for name in args.teachers:
        model = resnets.Classifier(resnets.build_net(name, len(classes)), autocast=CUDA).eval()
        resnets.fold_batch_norm(model)
        models[name] = model.to(ranks.device(), memory_format=torch.channels_last)

    variants: dict[str, Callable[[images.Step], None]] = {"bare loop": Bare(base, classes).step}
    for stage in args.stages:
        file = root / f"{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": int(stage[-1])}, "bf16": {"enabled": CUDA}}))
        cfg = dataclasses.replace(base, deepspeed_config=str(file))
        variants[f"recipe, {stage}"] = stepper(cfg, classes, root / stage).step
        if stage == args.stages[0]:
            for name, model in models.items():
                distil = dataclasses.replace(cfg, teachers=(name,), kd_ratio=0.9)
                variants[f"recipe, {stage}, teacher {name}"] = stepper(distil, classes, root / name, [model]).step
            if args.cache:
                distil = dataclasses.replace(cached, deepspeed_config=str(file))
                answers = cache_images.load_teacher(distil, classes, cached.teachers[0])
                variants[f"recipe, {stage}, cached teacher"] = stepper(distil, classes, root / "cached", [answers]).step
    for name, model in models.items():

        @torch.no_grad()
        def forward(batch: images.Step, model: Any = model) -> None:
            for micro in batch.micro_batches:
                model(*micro.to(ranks.device()).inputs)

        variants[f"teacher {name}, forward alone"] = forward

    for function in variants.values():  # warm up: compile, allocate
        timed(function, batches, 3, now)
    rounds = [
        {name: timed(function, batches, args.steps, now) for name, function in variants.items()}
        for _ in range(args.rounds)
    ]
    plain = f"recipe, {args.stages[0]}"
    print(f"\n{args}\n\n| variant | ms/step | images/s | time / bare (min to max) | / {plain} |\n|---|---|---|---|---|")
    for name in variants:
        seconds, spreads = statistics.median(r[name] for r in rounds), []
        for other in ("bare loop", plain):
            ratios = sorted(r[name] / r[other] for r in rounds)
            spreads.append(f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
        print(f"| {name} | {seconds * 1e3:.1f} | {args.micro_batch_size / seconds:.0f} | {' | '.join(spreads)} |")
    leave()
    return 0


if __name__ == "__main__":
    end_process(main)
