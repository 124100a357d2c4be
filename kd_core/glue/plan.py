"""The jobs of a GLUE evaluation: models and their checkpoints by name, texts as tokens, teachers; model x task x seed."""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_core.glue import tasks as glue
from kd_core.runs import folders
from kd_core.runs.jobs import Job, locked
from kd_core.runs.sources import model_source
from kd_core.system import files
from kd_core.system.terminal import one_line
from kd_core.text.pretrained import UNLOADABLE
from kd_core.text.tokenizer import load_tokenizer, require_same_tokenizer
from kd_core.training.checkpoints import checkpoint_names, read_checkpoint, read_state, step_of

ENCODER = "bert."  # the part of a masked-language model that is fine-tuned
EMBEDDING = "bert.embeddings.word_embeddings.weight"
WEIGHTS = r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)"  # what transformers loads, and no copy beside it
ONE_JOB = "--run-one-job"  # followed by a FineTuning as JSON, it makes the recipe run that
# Flags that a job takes as they are.
SAME_FOR_ALL = ("dropout", "kd_ratio", "temperature", "precision", "compile")


@dataclass(frozen=True)
class FineTuning:
    """A job's input; run.json keeps it as `config`.

    Args:
        out: its run folder.
        model: what `from_pretrained` takes; `weights` is a digest of the pretrained one, "" for a model of the hub.
        after: how, and by which teacher, MNLI was fine-tuned, where `model` is what came of that.
        data: the tokens, as `glue.tokenise` named them.
        settings: a `glue.Settings`, by name, but for its number of seeds.
        teacher: a model fine-tuned on the task, or None; `teacher_weights` is a digest of it.
        tokenizer: the model's, kept beside the fine-tuned one when `keep_model`.
    """

    out: str
    model: str
    weights: str
    after: dict[str, Any] | None
    task: str
    seed: int
    data: str
    settings: dict[str, Any]
    schedule: str
    warmup_fraction: float
    dropout: float
    teacher: str | None
    teacher_weights: str
    kd_ratio: float
    temperature: float
    precision: str
    compile: bool
    tokenizer: str
    keep_model: bool


@dataclass(frozen=True)
class Model:
    """A model to evaluate: what `from_pretrained` takes, and if it is of a run, that run, its step and seconds then."""

    name: str
    source: str
    run: str | None = None
    step: int | None = None
    seconds: dict[str, float] | None = None


@dataclass(frozen=True)
class TaskJob(Job):
    """A fine-tuning as a job."""

    input: FineTuning


@dataclass(frozen=True)
class Plan:
    """An evaluation: its folder and the lock on it, what is evaluated how, what is left out and why (tasks, and how many
    rows of a task's splits), and its jobs, the longest first."""

    folder: Path
    lock: int
    protocol: str
    data: str
    models: Sequence[Model]
    settings: dict[str, glue.Settings]
    skipped: dict[str, str]
    left_out: dict[str, dict[str, int]]
    control: dict[str, dict[str, float]]
    jobs: Sequence[TaskJob]


def make(cfg: Any, recipe: Path, undo: contextlib.ExitStack, held: contextlib.ExitStack) -> Plan:
    """The plan of `cfg`, the Config of the file `recipe`; checks all input first, cheapest first, then claims the folder.

    `undo` takes away what is made here, `held` keeps other calls out of the folder, from before a model is put there.

    Raises:
        ValueError, FileNotFoundError: what a user can fix.
    """
    protocol, source = glue.PROTOCOLS[cfg.protocol], glue.check_source(cfg.data)
    flags = {field: getattr(cfg, field) for field in glue.Settings._fields}
    settings = glue.task_settings(cfg.protocol, cfg.tasks or tuple(protocol.settings), flags)
    models = named_models(cfg.models)
    reasons = {task: glue.missing(glue.TASKS[task], source) for task in settings}
    skipped = {task: reason for task, reason in reasons.items() if reason}
    settings = {task: value for task, value in settings.items() if task not in skipped}
    if not settings:
        raise ValueError(f"--data {cfg.data} has none of the tasks: {', '.join(skipped.values())}")
    taught = named_teachers(cfg.teachers, list(settings))
    taught_by = {task: weights_digest(teacher) for task, teacher in taught.items()}
    longest = max(value.max_length for value in settings.values())
    tokenizers = {model.name: check_model(model, cfg.tokenizer, longest) for model in models}
    for task, teacher in taught.items():
        for ours in tokenizers.values():
            require_same_tokenizer(ours, teacher, flag=f"--teachers {task}=")
        check_teacher(glue.TASKS[task], teacher, settings[task].max_length)
    folder = claim(cfg, undo)
    lock = held.enter_context(locked(folder))
    evaluated: list[Model] = []
    all_jobs: list[TaskJob] = []
    control: dict[str, dict[str, float]] = {}
    left_out: dict[str, dict[str, int]] = {}
    for base in models:
        ours, mine = tokenizers[base.name], [*checkpoints(base, cfg.checkpoints, folder), base]
        digests = {model.name: weights_digest(model.source) for model in mine}
        evaluated += mine
        data = {
            task: glue.tokenise(glue.TASKS[task], source, ours, value.max_length) for task, value in settings.items()
        }
        after: dict[str, Any] | None = None
        if "MNLI" in settings:
            after = {"data": data["MNLI"], **_numbers(settings["MNLI"]), "teacher_weights": taught_by.get("MNLI", "")}
        for task, value in settings.items():
            examples = glue.examples(data[task])
            left_out[task] = {split: part.left_out for split, part in examples.items() if part.left_out}
            control.setdefault(task, glue.majority(glue.TASKS[task], examples))
            after_mnli = "MNLI" in settings and task in protocol.from_mnli
            steps = value.epochs * math.ceil(len(examples["train"]) / value.batch_size)
            for model in mine:
                mnli = f"{model.name}/MNLI/{cfg.seed}" if after_mnli else ""
                for seed in range(cfg.seed, cfg.seed + value.seeds):
                    name = f"{model.name}/{task}/{seed}"
                    job = FineTuning(
                        out=str(folder / name),
                        model=str(folder / mnli / "hf") if mnli else model.source,
                        weights=digests[model.name],
                        after=after if after_mnli else None,
                        task=task,
                        seed=seed,
                        data=data[task],
                        settings=_numbers(value),
                        schedule=protocol.schedule,
                        warmup_fraction=protocol.warmup_fraction,
                        teacher=taught.get(task),
                        teacher_weights=taught_by.get(task, ""),
                        tokenizer=ours.name_or_path,
                        keep_model=cfg.keep_models or (task == "MNLI" and bool(protocol.from_mnli)),
                        **{field: getattr(cfg, field) for field in SAME_FOR_ALL},
                    )
                    command = [sys.executable, str(recipe), ONE_JOB, json.dumps(dataclasses.asdict(job))]
                    all_jobs.append(TaskJob(name, folder / name, command, steps, (mnli,) * bool(mnli), False, job))
    # Others may wait for MNLI; then the longest first, so that no long one is left for the end.
    all_jobs.sort(key=lambda job: (job.input.task != "MNLI", -job.steps * job.input.settings["max_length"]))
    return Plan(folder, lock, cfg.protocol, source, evaluated, settings, skipped, left_out, control, all_jobs)


def _numbers(settings: glue.Settings) -> dict[str, float]:
    return {field: number for field, number in settings._asdict().items() if field != "seeds"}


# --- models -----------------------------------------------------------------------------------------------------------


def named_models(words: Sequence[str]) -> list[Model]:
    """The models of the command line: MODEL, named by the end of its path, or NAME=MODEL.

    Raises:
        ValueError: none, two of one name, or something that is no model.
        FileNotFoundError: nothing is there.
    """
    if not words:
        raise ValueError("no model; give run folders, Hugging Face folders or hub names")
    models = []
    for word in words:
        name, path = _split(word)
        there = Path(path) if path.strip("./") else Path(path).absolute()
        name = name or "-".join(there.parts[-3:]).strip("/.-")
        source = model_source(path, "model")
        result = _pretraining(Path(path).resolve(), source)
        if result is None:
            models.append(Model(name, source))
            continue
        seconds = {key: value for key, value in result.items() if key in ("train_s", "teacher_s", "data_s")}
        models.append(Model(name, source, str(Path(path).resolve()), result["step"], seconds))
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"two models are called {twice}; name them, as in first=MODEL second=MODEL")
    return models


def _pretraining(folder: Path, source: str) -> dict[str, Any] | None:
    """The result of the pretraining run that lies in `folder` and has made `source`, if there is one."""
    if Path(source) != folder / "hf" or not (folder / "run.json").exists():
        return None
    record = _record(folder / "run.json")
    config, result = record["config"], record["result"]
    known = "global_batch_size" in config and {"step", "train_s"} <= result.keys()  # or it is a fine-tuning
    return result if known else None


def _split(word: str) -> tuple[str, str]:
    """NAME and MODEL of NAME=MODEL; "" for a name that is not there, as in a path that holds a =."""
    match = re.fullmatch(r"(\w[\w.+-]*)=(.+)", word)
    return (match[1], match[2]) if match and not Path(word).exists() else ("", word)


def named_teachers(words: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Teachers by task, from TASK=MODEL; with teachers, every task needs one.

    Raises:
        ValueError, FileNotFoundError: no task, no teacher for a task, or no model.
    """
    taught = {}
    for word in words:
        task, path = _split(word)
        if task not in glue.TASKS:
            raise ValueError(f"--teachers {word} must be TASK=MODEL, the task one of {', '.join(glue.TASKS)}")
        taught[task] = model_source(path, f"--teachers {task}=")
    lacking = [task for task in tasks if words and task not in taught]
    if lacking:
        raise ValueError(f"--teachers names none for {lacking[0]}; add {lacking[0]}=MODEL, or leave it out of --tasks")
    return taught


def check_model(model: Model, given: str | None, max_length: int) -> Any:
    """The tokenizer that `model` comes with, or else the `given` one.

    Raises:
        ValueError: the model has no tokenizer, is no BERT, or is too small for the tokenizer or for `max_length`.
    """
    config = _bert_config(model.source, max_length)
    try:
        ours = load_tokenizer(model.source)
    except (ValueError, OSError) as error:
        if given is None:
            raise ValueError(f"{model.source} comes without a tokenizer ({error}); give --tokenizer") from error
        ours = load_tokenizer(given)
    if config.vocab_size < len(ours):
        raise ValueError(f"{model.source} knows {config.vocab_size} tokens, its tokenizer has {len(ours)}")
    return ours


def _bert_config(source: str, max_length: int) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except UNLOADABLE as error:
        raise ValueError(f"{source} cannot be loaded: {one_line(error)}") from error
    if config.model_type != "bert":
        raise ValueError(f"{source} is a model of type {config.model_type}; only bert can be fine-tuned here")
    if config.max_position_embeddings < max_length:
        limit = config.max_position_embeddings
        raise ValueError(f"--max-length {max_length} is more than the {limit} positions of {source}; lower it")
    return config


def check_teacher(task: glue.Task, source: str, max_length: int) -> None:
    """Refuses a teacher whose logits are not the task's, column by column.

    Raises:
        ValueError: not fine-tuned, on another task, of other labels, or too small for `max_length`.
    """
    config, flag = _bert_config(source, max_length), f"--teachers {task.name}={source}"
    if config.architectures != ["BertForSequenceClassification"]:
        raise ValueError(f"{flag} is not fine-tuned ({config.architectures}); give a folder that --keep-models made")
    job = Path(source).parent / "run.json"
    trained_on = _record(job)["config"].get("task") if job.exists() else None
    if trained_on not in (None, task.name):
        raise ValueError(f"{flag} was fine-tuned on {trained_on}; give one of {task.name}")
    labels = [config.id2label[column] for column in range(config.num_labels)]
    unnamed = all(str(label).startswith("LABEL_") for label in labels)
    if len(labels) != task.columns or (task.labels and not unnamed and labels != list(task.labels)):
        wanted = list(task.labels) or "a score"
        raise ValueError(
            f"{flag} tells apart {labels}, the task {wanted}; rename id2label in its config if it means these"
        )


def weights_digest(source: str) -> str:
    """Identifies a local model's weights; "" for a model of the hub."""
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(source).glob("*") if re.fullmatch(WEIGHTS, path.name)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16] if Path(source).is_dir() else ""


def require_unchanged(job: FineTuning) -> None:
    """Raises ValueError when the models of `job` are no longer those that it was planned with."""
    for source, digest in (
        (job.model, job.weights if job.after is None else ""),
        (job.teacher or "", job.teacher_weights),
    ):
        if digest and weights_digest(source) != digest:
            raise ValueError(f"{source} has changed since this evaluation began; leave it as it is, or start another")


# --- folders ----------------------------------------------------------------------------------------------------------


def claim(cfg: Any, undo: contextlib.ExitStack) -> Path:
    """The evaluation's folder, made absolute: the one in --out, which may have been begun, or a new one.

    Raises:
        ValueError: --out holds something else, or --resume finds nothing.
    """
    file = Path(cfg.out or "") / "run.json"
    if not (cfg.out and file.exists()):
        return folders.claim_folder(cfg, "glue", undo).resolve()
    there = _record(file)
    if there["recipe"] != "glue" or "models" not in there["config"]:
        raise ValueError(f"--out {cfg.out} holds a run that is no evaluation; choose another folder")
    return file.parent.resolve()


def _record(file: Path) -> dict[str, Any]:
    """The run.json at `file`."""
    record = folders.read_record(file.parent)
    return {"recipe": record["recipe"], "config": record["config"], "result": record.get("result", {})}


def checkpoints(model: Model, wanted: Sequence[str], folder: Path) -> list[Model]:
    """The run's checkpoints that are `wanted` ("all", or steps), as models in `folder`; the last step is the run's end.

    Raises:
        ValueError: not of a run, no such checkpoint, or a damaged one.
    """
    if not wanted:
        return []
    if model.run is None:
        raise ValueError(f"--checkpoints: {model.source} is no run folder; leave the flag or the model out")
    kept = Path(model.run) / "checkpoints"
    there = {step_of(name): kept / name for name in checkpoint_names(kept)}
    steps = list(there) if list(wanted) == ["all"] else [int(word) if word.isdecimal() else word for word in wanted]
    steps = list(dict.fromkeys(steps))
    absent = [step for step in steps if step not in there]
    if absent or not there:
        known = ", ".join(map(str, there)) or "none"
        raise ValueError(
            f"--checkpoints {' '.join(wanted)}: {model.run} has {known} (--save-every, --keep); give those or all"
        )
    return [_export(model, there[int(step)], folder) for step in steps if step != model.step]


def _export(model: Model, checkpoint: Path, folder: Path) -> Model:
    """Writes a checkpoint's encoder as a Hugging Face model, with the run's own config and tokenizer."""
    from transformers import BertConfig, BertModel

    step = step_of(checkpoint.name)
    target = folder / f"{model.name}@{step}" / "hf"
    state = read_checkpoint(checkpoint)
    config = BertConfig.from_pretrained(model.source)
    encoder: Any = BertModel(config, add_pooling_layer=False)
    state = {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
    name = EMBEDDING.removeprefix(ENCODER)
    state[name] = state[name][: config.vocab_size]  # training pads the vocabulary
    encoder.to(next(iter(state.values())).dtype).load_state_dict(state)
    target.parent.mkdir(parents=True, exist_ok=True)  # what an earlier call has put there may be of another run
    files.replace_folder(target, encoder.save_pretrained, load_tokenizer(model.source).save_pretrained)
    seconds, _ = read_state(checkpoint)["clocks"][0]  # rank 0's, as in the log
    seconds = {f"{part}_s": value for part, value in seconds.items()}
    return Model(f"{model.name}@{step}", str(target), model.run, step, seconds)
