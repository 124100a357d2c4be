"""GLUE: what pretrained BERTs are worth, fine-tuned on all tasks, many jobs at a time, into one table.

Method:  loss = (1 - r) * label_loss + r * kd_loss, r = kd_ratio, 0 without a teacher;
         kd_loss = tau^2 * KL(teacher || student), for STS-B (student - teacher)^2
Source:  Wang et al. 2019, GLUE, arXiv 1804.07461; protocols: the head of kd_core/glue/tasks.py
Command: bash launch/glue.sh runs/bert_kd/1 runs/bert_kd/2 --protocol mosaic
Smoke:   python recipes/glue.py runs/bert_kd/1 --data glue --protocol sane --tasks WNLI CoLA --epochs 1 --seeds 1
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tyro.conf import Positional

from kd_core import cli
from kd_core.glue import models
from kd_core.glue import plan as glue_plan
from kd_core.glue import report as glue_report
from kd_core.glue import tasks as glue
from kd_core.glue.plan import ONE_JOB, FineTuning
from kd_core.kernels.softmax_kl import softmax_kl_sum
from kd_core.runs import folders, jobs
from kd_core.system import files, ranks
from kd_core.system.terminal import say
from kd_core.text.tokenizer import load_tokenizer
from kd_core.training import schedules
from kd_core.training.processes import end_process

RECIPE = Path(__file__).stem
COMPILED_FROM = 10_000  # steps; on a CPU compiling took 10 to 45 s and saved 1 to 4 ms a step
PIECE = 64  # tokens that a core computes in the time that one more call of a small model takes


@dataclass(frozen=True)
class Config(cli.Flags):
    """Fine-tunes and evaluates pretrained BERTs on GLUE. A call with the --out of one that was stopped continues it."""

    models: Positional[tuple[str, ...]] = ()
    """Run folders, Hugging Face folders or hub names; NAME=MODEL names one."""
    data: str = glue.HUB
    """nyu-mll/glue (the hub), or a folder with the original files: CoLA/train.tsv and so on."""
    protocol: Literal["mosaic", "sane"] = "mosaic"
    """mosaic: settings for each task, as for MosaicBERT; sane: one setting for all, as for Cramming."""
    tasks: tuple[str, ...] = ()
    """Tasks; default: all of the protocol. One whose files are missing is skipped, and the table says so."""
    lr: tuple[str, ...] = ()
    """Peak learning rate, over the protocol's: a number for all tasks, or TASK=NUMBER; so are the next five."""
    weight_decay: tuple[str, ...] = ()
    """Decoupled: the share of a weight that is lost per step at the peak learning rate."""
    batch_size: tuple[str, ...] = ()
    """Examples per optimizer step."""
    epochs: tuple[str, ...] = ()
    """Passes over the training set."""
    seeds: tuple[str, ...] = ()
    """Number of seeds."""
    max_length: tuple[str, ...] = ()
    """Tokens at which an example is cut."""
    seed: int = 19
    """The first seed; the others are those after it. Initialisation of the classifier, order, dropout."""
    dropout: float = 0.1
    """On hidden states and attention."""
    teachers: tuple[str, ...] = ()
    """Models fine-tuned on a task to distil from, TASK=MODEL each; folders of jobs kept by --keep-models will do."""
    kd_ratio: float = 0.0
    """Weight of the teacher term, in [0, 1]; the labels get the rest."""
    temperature: float = 1.0
    """tau > 0; divides the logits of teacher and student in the teacher term."""
    checkpoints: tuple[str, ...] = ()
    """Evaluate these checkpoints of the runs too: all, or their steps."""
    tokenizer: str | None = None
    """For models that come without one: hub name, folder, tokenizer.json or SentencePiece .model."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the computation; weights are float32. auto: bf16 on a GPU, fp32 on a CPU."""
    compile: bool = False
    """torch.compile, in jobs of 10,000 steps or more: shorter ones may end before it has paid."""
    keep_models: bool = False
    """Keep each job's fine-tuned model in its folder (hf/)."""
    jobs: int | None = None
    """Jobs at a time; default: one a GPU, or without a GPU one a core."""
    out: str | None = None
    """Folder; default runs/glue/<next free number>. What has finished there is kept."""
    resume: bool = False
    """Take all other flags from --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("kd_ratio", 0 <= self.kd_ratio <= 1, "in [0, 1]")
        self.check("kd_ratio", bool(self.kd_ratio) == bool(self.teachers), "above 0 with --teachers, and 0 without")
        self.check("temperature", 0 < self.temperature < math.inf, "a finite number above 0")
        self.check("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self.check("seed", self.seed >= 0, "at least 0")
        self.check("jobs", self.jobs is None or self.jobs >= 1, "at least 1")


# --- one job ----------------------------------------------------------------------------------------------------------


def losses(job: FineTuning, task: glue.Task, logits_BV: Tensor, labels_B: Tensor, teacher_BV: Tensor | None) -> Tensor:
    """The method: [3], sums over the batch of the loss, its label term and its teacher term, the last two detached."""
    if task.labels:
        loss, kd, label = softmax_kl_sum(
            logits_BV, teacher_BV, labels_B.long(), kd_weight=job.kd_ratio, label_weight=1 - job.kd_ratio,
            temperature=job.temperature,
        )  # fmt: skip
    else:
        label = F.mse_loss(logits_BV[:, 0], labels_B, reduction="sum")
        kd = label.new_zeros(()) if teacher_BV is None else F.mse_loss(logits_BV, teacher_BV, reduction="sum")
        loss = (1 - job.kd_ratio) * label + job.kd_ratio * kd
    return torch.stack([loss, label.detach(), kd.detach()])


def batch_losses(
    job: FineTuning, task: glue.Task, model: Any, train: glue.Examples, rows: Tensor, teacher_EV: Tensor | None
) -> Tensor:
    """The losses of the examples `rows` [B]. A CPU computes those of like lengths together, which saves padding."""
    on_gpu = torch.cuda.is_available()
    pieces = [rows] if on_gpu else train.pieces(rows, PIECE * torch.get_num_threads())
    rows = torch.cat(pieces)
    logits_BV = torch.cat(
        [models.forward(job, model, train.batch(piece, multiple=8 if on_gpu else 1)) for piece in pieces]
    )
    labels_B = train.labels[rows].to(ranks.device(), non_blocking=True)
    teacher_BV = None if teacher_EV is None else teacher_EV[rows.to(ranks.device())]
    return losses(job, task, logits_BV, labels_B, teacher_BV)


def ask_teacher(job: FineTuning, task: glue.Task, data: dict[str, glue.Examples]) -> tuple[Tensor, dict[str, Any]]:
    """The teacher's logits [E, V] of the training set, for all epochs as it has no dropout; seconds, and its own scores."""
    began, teacher = time.perf_counter(), models.build_teacher(job, task)
    teacher_EV = models.predict(job, teacher, data["train"]).to(ranks.device())
    return teacher_EV, {"teacher_s": time.perf_counter() - began, "teacher": models.evaluate(job, task, teacher, data)}


def batches(job: FineTuning, train: glue.Examples) -> Iterator[Tensor]:
    """Rows of all batches, epoch after epoch: a pure function of the seed and the epoch."""
    for epoch in range(job.settings["epochs"]):
        generator = torch.Generator().manual_seed(1000 * job.seed + epoch)
        yield from torch.randperm(len(train), generator=generator).split(job.settings["batch_size"])


def fine_tune(job: FineTuning, undo: contextlib.ExitStack) -> int:
    """Runs a job: `job.out` becomes a run folder with its metrics, its test predictions and, if kept, its model.

    A job has no checkpoints; when it is interrupted, `undo` says what is lost.
    """
    began = time.perf_counter()
    glue_plan.require_unchanged(job)
    folder, task, data = Path(job.out), glue.TASKS[job.task], glue.examples(job.data)
    train, student = data["train"], models.build_student(job, task)
    per_epoch = math.ceil(len(train) / job.settings["batch_size"])
    steps = per_epoch * job.settings["epochs"]
    teacher_EV, taught_by = ask_teacher(job, task, data) if job.teacher else (None, {"teacher_s": 0.0})
    peak, decay = job.settings["lr"], job.settings["weight_decay"]
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=peak, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay / peak, fused=True
    )
    factor = {"linear": schedules.linear_warmup_decay, "cosine": schedules.linear_warmup_cosine}[job.schedule]
    if job.compile and steps >= COMPILED_FROM:
        student.compile(dynamic=True)
    log = glue_report.Log(folder, folders.describe(RECIPE, job))
    train_s, step, resumed = 0.0, 0, time.perf_counter()
    undo.callback(lambda: say(f"steps 1 to {step} of {steps} are lost; the same call begins this job anew"))
    for step, rows in enumerate(batches(job, train), 1):
        student.train()
        for group in optimizer.param_groups:
            group["lr"] = peak * factor(step - 1, steps, warmup_fraction=job.warmup_fraction)
        sums = batch_losses(job, task, student, train, rows, teacher_EV)
        (sums[0] / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 100) and step % per_epoch:
            continue
        loss, label_loss, kd_loss = (sums.detach() / len(rows)).tolist()  # here the host waits for the GPU
        if not math.isfinite(loss):
            raise ValueError(f"{job.task}, seed {job.seed}: the loss is {loss} at step {step}; lower --lr")
        train_s += time.perf_counter() - resumed
        line = {"step": step, "loss": loss, "label_loss": label_loss, "kd_loss": kd_loss, "train_s": train_s}
        scores = models.evaluate(job, task, student, data) if step % per_epoch == 0 else {}
        log.write(line | {"lr": optimizer.param_groups[0]["lr"]} | scores)
        resumed = time.perf_counter()
    for split in task.submitted.keys() & data.keys():
        predicted = glue.predicted(task, models.predict(job, student, data[split]))
        glue_report.write_predictions(folder, task, split, data[split], predicted)
    if job.keep_model:
        ours = load_tokenizer(job.tokenizer)
        files.replace_folder(folder / "hf", student.save_pretrained, ours.save_pretrained)
    log.finish(train_s=train_s, seconds=time.perf_counter() - began, step=steps, **taught_by, **scores)
    return 0


# --- all jobs ---------------------------------------------------------------------------------------------------------


def main(typed: Sequence[str] | None = None) -> int:
    """Runs the recipe, or with ONE_JOB one of its jobs, as the command line `typed` says; returns the exit code."""
    with contextlib.ExitStack() as held:
        with cli.one_line_errors() as undo:
            job, words = cli.take(sys.argv[1:] if typed is None else typed, ONE_JOB)
            if job:
                return fine_tune(FineTuning(**json.loads(job)), undo)
            cfg = cli.parse(Config, words)
            plan = glue_plan.make(cfg, Path(__file__), undo, held)
        with cli.one_line_errors():
            for one in plan.jobs:
                jobs.check_unchanged(one, dataclasses.asdict(one.input), recipe=RECIPE)
            folders.write_record(plan.folder, folders.describe(RECIPE, cfg))
            places = jobs.places(cfg.jobs, per_core=True)
            jobs.run_all(plan.jobs, places, plan.lock, glue_report.summary, plan.folder, "jobs")
            glue_report.write(plan)
    return 0


if __name__ == "__main__":
    end_process(main)
