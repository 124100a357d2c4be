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

from kd_core import engine, glue, report, teachers, tokenizer
from kd_core.jobs import Job

ENCODER = "bert."  # the part of a masked-language model that is fine-tuned
EMBEDDING = "bert.embeddings.word_embeddings.weight"
# Flags that a job takes as they are.
SAME_FOR_ALL = ("dropout", "kd_ratio", "temperature", "precision", "compile")


@dataclass(frozen=True)
class FineTuning:
    """A job's input; run.json keeps it as `config`.

    Args:
        out: its run folder.
        model: what `from_pretrained` takes; `weights` is a digest of it, "" for a model of the hub.
        data: the tokens, as `glue.tokenise` named them.
        settings: a `glue.Settings`, by name, but for its number of seeds.
        teacher: a model fine-tuned on the task, or None.
        tokenizer: the model's, kept beside the fine-tuned one when `keep_model`.
    """

    out: str
    model: str
    weights: str
    task: str
    seed: int
    data: str
    settings: dict[str, Any]
    schedule: str
    warmup_fraction: float
    dropout: float
    teacher: str | None
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
    """An evaluation: its folder, what is evaluated how, what is left out and why, and its jobs, the longest first."""

    folder: Path
    protocol: str
    data: str
    models: Sequence[Model]
    settings: dict[str, glue.Settings]
    skipped: dict[str, str]
    control: dict[str, dict[str, float]]
    jobs: Sequence[TaskJob]


def make(cfg: Any, recipe: Path, undo: contextlib.ExitStack) -> Plan:
    """The plan of `cfg`, the Config of the file `recipe`; checks all input first, cheapest first, then claims the folder.

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
    longest = max(value.max_length for value in settings.values())
    tokenizers = {model.name: check_model(model, cfg.tokenizer, longest) for model in models}
    for task, teacher in taught.items():
        for ours in tokenizers.values():
            tokenizer.require_same_tokenizer(ours, teacher, flag=f"--teachers {task}=")
    folder = claim(cfg, undo)
    evaluated: list[Model] = []
    all_jobs: list[TaskJob] = []
    control: dict[str, dict[str, float]] = {}
    for base in models:
        ours, mine = tokenizers[base.name], [*checkpoints(base, cfg.checkpoints, folder), base]
        digests = {model.name: weights_digest(model.source) for model in mine}
        evaluated += mine
        for task, value in settings.items():
            data = glue.tokenise(glue.TASKS[task], source, ours, value.max_length)
            examples = glue.examples(data)
            control.setdefault(task, glue.majority(glue.TASKS[task], examples))
            steps = value.epochs * math.ceil(len(examples["train"]) / value.batch_size)
            for model in mine:
                mnli = f"{model.name}/MNLI/{cfg.seed}" if "MNLI" in settings and task in protocol.from_mnli else ""
                for seed in range(cfg.seed, cfg.seed + value.seeds):
                    name = f"{model.name}/{task}/{seed}"
                    job = FineTuning(
                        out=str(folder / name),
                        model=str(folder / mnli / "hf") if mnli else model.source,
                        weights=digests[model.name],
                        task=task,
                        seed=seed,
                        data=data,
                        settings={field: number for field, number in value._asdict().items() if field != "seeds"},
                        schedule=protocol.schedule,
                        warmup_fraction=protocol.warmup_fraction,
                        teacher=taught.get(task),
                        tokenizer=ours.name_or_path,
                        keep_model=cfg.keep_models or (task == "MNLI" and bool(protocol.from_mnli)),
                        **{field: getattr(cfg, field) for field in SAME_FOR_ALL},
                    )
                    command = [sys.executable, str(recipe), "--job", json.dumps(dataclasses.asdict(job))]
                    all_jobs.append(TaskJob(name, folder / name, command, steps, (mnli,) * bool(mnli), False, job))
    # Others may wait for MNLI; then the longest first, so that no long one is left for the end.
    all_jobs.sort(key=lambda job: (job.input.task != "MNLI", -job.steps * job.input.settings["max_length"]))
    return Plan(folder, cfg.protocol, source, evaluated, settings, skipped, control, all_jobs)


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
        name = name or "-".join(Path(path).parts[-3:]).strip("/.-")
        source = teachers.model_source(path, "model")
        run = Path(path) if Path(source).parent == Path(path) and (Path(path) / "run.json").exists() else None
        if run is None:
            models.append(Model(name, str(Path(source).resolve()) if Path(source).exists() else source))
            continue
        result = json.loads((run / "run.json").read_text()).get("result", {})
        seconds = {key: value for key, value in result.items() if key in ("train_s", "teacher_s", "data_s")}
        models.append(Model(name, str(Path(source).resolve()), str(run.resolve()), result.get("step"), seconds))
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"two models are called {twice}; name them, as in first=MODEL second=MODEL")
    return models


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
        source = teachers.model_source(path, f"--teachers {task}=")
        taught[task] = str(Path(source).resolve()) if Path(source).exists() else source
    lacking = [task for task in tasks if words and task not in taught]
    if lacking:
        raise ValueError(f"--teachers names none for {lacking[0]}; add {lacking[0]}=MODEL, or leave it out of --tasks")
    return taught


def check_model(model: Model, given: str | None, max_length: int) -> Any:
    """The tokenizer that `model` comes with, or else the `given` one.

    Raises:
        ValueError: the model has no tokenizer, is no BERT, or is too small for the tokenizer or for `max_length`.
    """
    from transformers import AutoConfig

    try:
        ours = tokenizer.load_tokenizer(given or model.source)
    except (ValueError, OSError) as error:
        if given:
            raise
        raise ValueError(f"{model.source} comes without a tokenizer ({error}); give --tokenizer") from error
    try:
        config = AutoConfig.from_pretrained(model.source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{model.source} cannot be loaded: {str(error).splitlines()[0]}") from error
    if config.model_type != "bert":
        raise ValueError(f"{model.source} is a model of type {config.model_type}; only bert can be fine-tuned here")
    if config.vocab_size < len(ours):
        raise ValueError(f"{model.source} knows {config.vocab_size} tokens, its tokenizer has {len(ours)}")
    if config.max_position_embeddings < max_length:
        limit = config.max_position_embeddings
        raise ValueError(f"--max-length {max_length} is more than the {limit} positions of {model.source}; lower it")
    return ours


def weights_digest(source: str) -> str:
    """Identifies a local model's weights; "" for a model of the hub."""
    digest = hashlib.sha256()
    for file in sorted(path for pattern in ("*.safetensors", "*.bin") for path in Path(source).glob(pattern)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16] if Path(source).is_dir() else ""


# --- folders ----------------------------------------------------------------------------------------------------------


def claim(cfg: Any, undo: contextlib.ExitStack) -> Path:
    """The evaluation's folder, made absolute: the one in --out, which may have been begun, or a new one.

    Raises:
        ValueError: --out holds something else, or --resume finds nothing.
    """
    file = Path(cfg.out or "") / "run.json"
    if not (cfg.out and file.exists()):
        return report.claim_folder(cfg, "glue", undo).resolve()
    there = json.loads(file.read_text())
    if there.get("recipe") != "glue" or "models" not in there.get("config", {}):
        raise ValueError(f"--out {cfg.out} holds a run that is no evaluation; choose another folder")
    return file.parent.resolve()


def checkpoints(model: Model, wanted: Sequence[str], folder: Path) -> list[Model]:
    """The run's checkpoints that are `wanted` ("all", or steps), as models in `folder`; the last step is the run's end.

    Raises:
        ValueError: not of a run, no such checkpoint, or a damaged one.
    """
    if not wanted:
        return []
    if model.run is None:
        raise ValueError(f"--checkpoints: {model.source} is no run folder; leave the flag or the model out")
    there = {engine.step_of(path.name): path for path in sorted((Path(model.run) / "checkpoints").glob("step*"))}
    steps = list(there) if list(wanted) == ["all"] else [int(word) if word.isdecimal() else word for word in wanted]
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

    step = engine.step_of(checkpoint.name)
    target = folder / f"{model.name}@{step}" / "hf"
    state, client_state = engine.read_checkpoint(checkpoint)
    if not target.exists():
        config = BertConfig.from_pretrained(model.source)
        encoder: Any = BertModel(config, add_pooling_layer=False)
        state = {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
        name = EMBEDDING.removeprefix(ENCODER)
        state[name] = state[name][: config.vocab_size]  # training pads the vocabulary
        encoder.to(next(iter(state.values())).dtype).load_state_dict(state)
        ours = tokenizer.load_tokenizer(model.source)
        target.parent.mkdir(parents=True, exist_ok=True)
        report.replace_folder(target, encoder.save_pretrained, ours.save_pretrained)
    seconds, _ = client_state["clocks"][0]  # rank 0's, as in the log
    seconds = {f"{part}_s": value for part, value in seconds.items()}
    return Model(f"{model.name}@{step}", str(target), model.run, step, seconds)
