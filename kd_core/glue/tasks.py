"""GLUE: its nine tasks, their metrics, two protocols, and their texts as tokens.

    local folder in the original TSV layout, or the hub -> texts and labels, checked -> tokens, once for all jobs -> batches

Shape letters: E examples, B examples of a batch, T positions, V classes (1 for a regression).

Source: Wang et al. 2019, GLUE (arXiv 1804.07461). Protocols: `mosaic` is that of MosaicML's BERT benchmark (github.com/
mosaicml/examples), `sane` GLUE_sane of Geiping and Goldstein 2022 (arXiv 2212.14034).
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kd_core.system.checked import reading
from kd_core.system.files import UNREAD, build_once, cache_key, cache_root, file_digest
from kd_core.system.hub import require_hub
from kd_core.system.terminal import one_line
from kd_core.text.documents import COMPRESSIONS, opened
from kd_core.text.tokenizer import tokenizer_digest, unknown_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HUB = "nyu-mll/glue"
MAX_BROKEN_ROWS = 0.01  # QQP's official files have a few rows that lack columns
NUMBER = re.compile(r"\d{1,18}")  # of a row
CHUNK = 10_000  # texts tokenised at a time


# --- tasks ------------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Where a split lies: a file below the local folder; a config and a split of the hub's data set."""

    file: str
    hub: tuple[str, str]


class Task(NamedTuple):
    """A task of GLUE.

    Args:
        name: of its folder, and of its file in a submission.
        texts, hub_texts: columns of its one or two texts, in the files and on the hub.
        label: column of the label in the files.
        labels: what stands there for class 0, 1, ...; in a submission too. Empty for a score from 0 to 5 (regression).
        metrics: official metrics, of each split in `evaluated`.
        splits: "train", then "dev", "test" and further ones of these kinds.
        submitted: split -> name of its file in a submission.
    """

    name: str
    texts: tuple[str, ...]
    hub_texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: dict[str, Split]
    submitted: dict[str, str]

    @property
    def evaluated(self) -> list[str]:
        return [split for split in self.splits if split.startswith("dev")]

    @property
    def columns(self) -> int:
        """V, the number of logits."""
        return max(1, len(self.labels))


def _task(
    name: str, hub: str, texts: str, *metrics: str, label: str = "label", labels: str = "0 1", hub_texts: str = ""
) -> Task:
    splits = {"train": ("train", "train"), "dev": ("dev", "validation"), "test": ("test", "test")}
    submitted = {"test": name}
    if name == "MNLI":
        splits |= {"dev": ("dev_matched", "validation_matched"), "test": ("test_matched", "test_matched")}
        splits |= {"dev-mm": ("dev_mismatched", "validation_mismatched")}
        splits |= {"test-mm": ("test_mismatched", "test_mismatched")}
        submitted = {"test": "MNLI-m", "test-mm": "MNLI-mm", "test-ax": "AX"}
    places = {split: Split(f"{name}/{file}.tsv", (hub, there)) for split, (file, there) in splits.items()}
    if name == "MNLI":
        places["test-ax"] = Split("diagnostic/diagnostic.tsv", ("ax", "test"))
    columns = tuple(texts.split("|"))
    return Task(
        name, columns, tuple(hub_texts.split()) or columns, label, tuple(labels.split()), metrics, places, submitted
    )


TASKS = {
    task.name: task
    for task in (
        _task("CoLA", "cola", "sentence", "matthews"),
        _task("SST-2", "sst2", "sentence", "accuracy"),
        _task(
            *("MRPC", "mrpc", "#1 String|#2 String", "accuracy", "f1"),
            label="Quality",
            hub_texts="sentence1 sentence2",
        ),
        _task("STS-B", "stsb", "sentence1|sentence2", "pearson", "spearman", label="score", labels=""),
        _task("QQP", "qqp", "question1|question2", "accuracy", "f1", label="is_duplicate"),
        _task(
            *("MNLI", "mnli", "sentence1|sentence2", "accuracy"),
            label="gold_label",
            labels="entailment neutral contradiction",
            hub_texts="premise hypothesis",
        ),
        _task("QNLI", "qnli", "question|sentence", "accuracy", labels="entailment not_entailment"),
        _task("RTE", "rte", "sentence1|sentence2", "accuracy", labels="entailment not_entailment"),
        _task("WNLI", "wnli", "sentence1|sentence2", "accuracy"),
    )
}
# Files without a header line, and their columns.
HEADERLESS = {file: ["source", "label", "mark", "sentence"] for file in ("CoLA/train.tsv", "CoLA/dev.tsv")}


# --- metrics ----------------------------------------------------------------------------------------------------------


def metric(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """One of GLUE's metrics as scikit-learn and scipy have it, as a fraction (in [-1, 1] or [0, 1]).

    Args:
        name: "accuracy", "f1" (of class 1; 0 when nothing is predicted or is of that class), "matthews", "pearson" or
            "spearman"; the last three are 0 where they are undefined, as scikit-learn has it for Matthews'.
        predictions, labels: [E], classes or scores.
    """
    if name in ("pearson", "spearman"):
        from scipy import stats

        function = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning)  # scipy's, that it is undefined
            return float(np.nan_to_num(function(predictions, labels).statistic))
    from sklearn import metrics

    if name == "f1":
        return float(metrics.f1_score(labels, predictions, zero_division=0.0))
    function = {"accuracy": metrics.accuracy_score, "matthews": metrics.matthews_corrcoef}[name]
    return float(function(labels, predictions))


def score(task: Task, split: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics on a split in `task.evaluated`: "accuracy", and "accuracy-mm" on "dev-mm"."""
    suffix = split.removeprefix("dev")
    return {name + suffix: metric(name, predictions, labels) for name in task.metrics}


def predicted(task: Task, logits_EV: Tensor) -> np.ndarray:
    """[E]: the classes, or the scores, that the logits say."""
    return (logits_EV.argmax(1) if task.labels else logits_EV[:, 0]).numpy()


def majority(task: Task, data: dict[str, "Examples"]) -> dict[str, float]:
    """The control: scores of always predicting training's most frequent class, or its mean score."""
    labels = data["train"].labels
    constant = float(labels.mode().values if task.labels else labels.mean())
    scores: dict[str, float] = {}
    for split in task.evaluated:
        truth = data[split].labels.numpy()
        scores |= score(task, split, np.full_like(truth, constant), truth)
    return scores


# --- protocols --------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """How a task is fine-tuned; `weight_decay` is the share of a weight lost per step at the peak learning rate."""

    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    seeds: int
    max_length: int


class Protocol(NamedTuple):
    """Settings of each task that it knows, and how scores become an average.

    Args:
        settings: by task.
        schedule: of the learning rate after the warm-up, to 0.
        from_mnli: tasks that start from the encoder fine-tuned on MNLI, when MNLI is evaluated too.
        unscored: metrics that do not count. A task's score is the mean of all others and of all seeds, pooled; the
            average is the mean over the tasks in AVERAGED.
    """

    settings: dict[str, Settings]
    schedule: str
    warmup_fraction: float
    from_mnli: tuple[str, ...]
    unscored: tuple[tuple[str, str], ...]


AVERAGED = tuple(name for name in TASKS if name != "WNLI")
PROTOCOLS = {
    "mosaic": Protocol(
        {
            "MNLI": Settings(5e-5, 5e-6, 48, 3, 1, 256),
            "QQP": Settings(3e-5, 3e-6, 16, 5, 1, 256),
            "QNLI": Settings(1e-5, 1e-6, 16, 10, 1, 256),
            "SST-2": Settings(3e-5, 3e-6, 16, 3, 3, 256),
            "CoLA": Settings(5e-5, 5e-6, 32, 10, 4, 256),
            "STS-B": Settings(3e-5, 3e-6, 32, 10, 5, 256),
            "MRPC": Settings(8e-5, 8e-6, 32, 10, 5, 256),
            "RTE": Settings(1e-5, 1e-5, 16, 3, 5, 256),
        },
        *("linear", 0.06, ("RTE", "MRPC", "STS-B"), (("STS-B", "pearson"),)),
    ),
    "sane": Protocol(dict.fromkeys(TASKS, Settings(4e-5, 0.0, 16, 5, 3, 128)), "cosine", 0.1, (), ()),
}


def task_settings(protocol: str, tasks: Sequence[str], flags: dict[str, Sequence[str]]) -> dict[str, Settings]:
    """The protocol's settings of `tasks`, and over them flags such as {"epochs": ["3", "CoLA=5"]}.

    A value alone is for all tasks, TASK=VALUE for one.

    Raises:
        ValueError: a task that is none of GLUE's or that the protocol does not know; a value that is not allowed.
    """
    known = PROTOCOLS[protocol].settings
    for name in tasks:
        _check_task(name, "--tasks")
        if name not in known:
            raise ValueError(f"--tasks {name}: the {protocol} protocol does not have it, only {', '.join(known)}")
    settings = {name: known[name] for name in tasks}
    for field, words in flags.items():
        flag = "--" + field.replace("_", "-")
        for word in sorted(words, key=lambda word: "=" in word):
            name, _, value = word.rpartition("=")
            number = _number(flag, word, value, field)
            if name:
                _check_task(name, flag)
                if name not in tasks:
                    raise ValueError(f"{flag} {word}: {name} is not evaluated; leave it out")
            for task in [name] if name else tasks:
                settings[task] = Settings(**settings[task]._asdict() | {field: number})
    return settings


def _check_task(name: str, flag: str) -> None:
    if name not in TASKS:
        raise ValueError(f"{flag} {name}: no task of GLUE; choose from {', '.join(TASKS)}")


def _number(flag: str, word: str, value: str, field: str) -> float:
    kind = Settings.__annotations__[field]
    try:
        number = kind(value)
    except ValueError:
        number = float("nan")
    least = 8 if field == "max_length" else 0 if kind is float else 1
    if not least <= number < float("inf") or (field == "lr" and number == 0):
        raise ValueError(
            f"{flag} {word} must be {'a' if kind is float else 'a whole'} number"
            f"{' above 0' if field == 'lr' else f' of at least {least}'}, for all tasks or as TASK=NUMBER"
        )
    return number


# --- texts ------------------------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """A split: its one or two lists of texts, its labels (-1 in test splits), its numbers in a submission.

    `left_out` counts the rows that lack columns.
    """

    texts: list[list[str]]
    labels: list[float]
    numbers: list[int]
    left_out: int = 0


def missing(task: Task, source: str) -> str | None:
    """Which file of train and dev the local folder `source` lacks; None when all are there, or `source` is the hub."""
    if source == HUB:
        return None
    needed = [task.splits[split].file for split in ("train", *task.evaluated)]
    return next((f"no {file}" for file in needed if not find_file(source, file)), None)


def find_file(source: str, name: str) -> Path | None:
    """The file `name` of the local folder `source`, compressed or not; None when it is not there.

    Raises:
        ValueError: it is there twice, or only in a form that is not read.
    """
    named = Path(source, name)
    there = sorted(named.parent.iterdir()) if named.parent.is_dir() else []
    read = [file for file in there if file.name.lower() in {named.name + suffix for suffix in ("", *COMPRESSIONS)}]
    if len(read) > 1:
        raise ValueError(f"--data {source} holds {read[0].name} and {read[1].name} in {named.parent}; keep one of them")
    forms = tuple(named.stem + suffix for suffix in (".csv", ".txt", ".json", ".parquet"))
    for file in there if not read else []:
        if file.name.lower().startswith(forms) or file.name.lower() in {named.name + suffix for suffix in UNREAD}:
            raise ValueError(
                f"--data {source}: {file} is not read; give {name}, which may be compressed as {COMPRESSIONS}"
            )
    return read[0] if read else None


def check_source(source: str) -> str:
    """`source`, made absolute: the hub's name, or a folder in the original layout, <task>/train.tsv and so on.

    Raises:
        FileNotFoundError: no such folder.
    """
    if source == HUB:
        return source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {source} is no folder; give one with CoLA/train.tsv and so on, or {HUB}")
    return str(folder.resolve())


def read_split(task: Task, split: str, source: str) -> Texts:
    """Reads and checks a split.

    Raises:
        ValueError: columns are missing, rows are broken, a label is none of the task's, or the hub cannot be reached.
    """
    return (_read_hub if source == HUB else _read_tsv)(task, split, source)


def _read_tsv(task: Task, split: str, source: str) -> Texts:
    file = find_file(source, task.splits[split].file)
    assert file is not None, f"{split} is not there"
    with opened(file) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    # Not the csv module: quotation marks are literal, and only a line feed ends a row.
    rows = [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]
    first = 0 if task.splits[split].file in HEADERLESS else 1
    header = HEADERLESS.get(task.splits[split].file) or (rows[0] if rows else [])
    labelled = not split.startswith("test")
    wanted = [*task.texts, task.label] if labelled else list(task.texts)
    lacking = [name for name in wanted if name not in header]
    if lacking:
        raise ValueError(
            f"{file} has no column {lacking[0]!r}, only {[name[:30] for name in header[:12]]}; give {task.name}'s original file"
        )
    index = next((name for name in ("index", "id") if name in header and not labelled), None)
    at = [header.index(name) for name in [*wanted, *([index] if index else [])]]
    whole = [(number, row) for number, row in enumerate(rows[first:], first + 1) if len(row) > max(at)]
    broken = len(rows) - first - len(whole)
    if not whole or broken > (MAX_BROKEN_ROWS * len(rows) if labelled else 0):
        problem = f"{broken} of {len(rows) - first} rows with fewer columns than {max(at) + 1}" if broken else "no rows"
        raise ValueError(f"{file} has {problem}; give {task.name}'s original file")
    labels = [_label(task, row[at[-1]], f"{file}, line {number}") for number, row in whole] if labelled else []
    numbers = list(range(len(whole)))
    if index:
        wrong = [(number, row[at[-1]]) for number, row in whole if not NUMBER.fullmatch(row[at[-1]])]
        if wrong:
            raise ValueError(f"{file}, line {wrong[0][0]}: {index} {wrong[0][1]!r} is no number")
        numbers = [int(row[at[-1]]) for _, row in whole]
    texts = [[row[column] for _, row in whole] for column in at[: len(task.texts)]]
    return Texts(texts, labels or [-1.0] * len(whole), numbers, broken)


def _label(task: Task, text: str, place: str) -> float:
    if task.labels:
        if text not in task.labels:
            raise ValueError(f"{place}: {task.label} {text!r} is none of {task.name}'s labels {', '.join(task.labels)}")
        return task.labels.index(text)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 5:
        raise ValueError(f"{place}: {task.label} {text!r} is no number from 0 to 5")
    return value


def _read_hub(task: Task, split: str, source: str) -> Texts:
    import datasets

    config, there = task.splits[split].hub
    require_hub(f"--data {source}")
    try:
        rows = datasets.load_dataset(source, config, split=there)
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {source}: {config} cannot be loaded from the hub ({one_line(error)})") from error
    lacking = [name for name in (*task.hub_texts, "label", "idx") if name not in rows.column_names]
    if lacking:
        raise ValueError(f"--data {source}: {config} has no column {lacking[0]!r}, only {rows.column_names}")
    if split.startswith("test"):  # MRPC's and AX's have labels there, unlike the original files
        labels = [-1.0] * len(rows)
    else:
        labels, most = list(rows["label"]), len(task.labels) - 1 if task.labels else 5
        kinds = int if task.labels else (int, float)
        if not all(isinstance(label, kinds) and 0 <= label <= most for label in labels):
            raise ValueError(f"--data {source}: {config} {there} has labels outside 0 to {most}")
    return Texts([list(rows[name]) for name in task.hub_texts], labels, list(rows["idx"]))


# --- tokens -----------------------------------------------------------------------------------------------------------


class Examples:
    """A split as tokens.

    Args:
        file: one that `tokenise` wrote: tokens [S] of all examples, `ends` [E] where each ends in them, `firsts` [E] how
            many tokens come before its second text, labels [E], numbers [E]; `left_out` rows that lack columns.
    """

    def __init__(self, file: Path) -> None:
        with reading(file, f"remove {file.parent}"), np.load(file) as arrays:
            self.tokens, ends, self.firsts, self.labels, self.numbers = (
                torch.from_numpy(arrays[name]) for name in ("tokens", "ends", "firsts", "labels", "numbers")
            )
            self.left_out = int(arrays.get("left_out", 0))
        self.starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
        self.lengths = ends - self.starts

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids, token_type_ids and attention_mask, [B, T] each; T is the longest row's, to a multiple."""
        lengths_B1 = self.lengths[rows, None]
        positions_T = torch.arange(-(-int(lengths_B1.max()) // multiple) * multiple)
        there_BT = positions_T < lengths_B1
        sources_BT = (self.starts[rows, None] + positions_T).clamp(max=len(self.tokens) - 1)
        input_ids = self.tokens[sources_BT].masked_fill(~there_BT, 0).long()
        return input_ids, (there_BT & (positions_T >= self.firsts[rows, None])).long(), there_BT.long()

    def pieces(self, rows: Tensor, overhead: int) -> list[Tensor]:
        """`rows` [B] by length, cut into the pieces whose padded tokens, and `overhead` for each piece, sum to least."""
        rows = rows[self.lengths[rows].argsort()]
        best: list[tuple[int, list[int]]] = [(0, [])]  # of the first rows: what they cost at least, and in which sizes
        for end, longest in enumerate(self.lengths[rows].tolist(), 1):
            cost, start = min((best[start][0] + (end - start) * longest + overhead, start) for start in range(end))
            best.append((cost, [*best[start][1], end - start]))
        return list(rows.split(best[-1][1]))


def tokenise(task: Task, source: str, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> str:
    """The task as tokens, in the cache; made once for all jobs. Returns what `examples` finds it by.

    Raises:
        ValueError: as `read_split`.
    """
    places = {} if source == HUB else {split: find_file(source, place.file) for split, place in task.splits.items()}
    files = {split: file_digest(file) for split, file in places.items() if file}
    splits = list(task.splits if source == HUB else files)
    key = cache_key("glue", source if source == HUB else "", repr(files), tokenizer_digest(tokenizer), max_length)

    def build(folder: Path) -> None:
        for split in splits:
            texts = read_split(task, split, source)
            arrays = _tokens(texts, tokenizer, max_length)
            unknown_share(tokenizer, arrays["tokens"], f"--data {source}: {task.splits[split].file}")
            np.savez(folder / f"{split}.npz", **arrays)

    name = f"{task.name}-{key}"
    build_once(cache_root() / "glue" / name, build)
    return name


def examples(name: str) -> dict[str, Examples]:
    """All splits of what `tokenise` has named."""
    return {file.stem: Examples(file) for file in sorted((cache_root() / "glue" / name).glob("*.npz"))}


def _tokens(texts: Texts, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> dict[str, Any]:
    tokens, lengths, firsts = [], [], []
    for encoded in _encoded(texts.texts, tokenizer, max_length):
        for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True):
            tokens.append(np.array(ids, dtype=np.int32))
            lengths.append(len(ids))
            firsts.append(len(ids) - sum(types))
    return {
        "tokens": np.concatenate(tokens),
        "ends": np.cumsum(lengths, dtype=np.int64),
        "firsts": np.array(firsts, dtype=np.int64),
        "labels": np.array(texts.labels, dtype=np.float32),
        "numbers": np.array(texts.numbers, dtype=np.int64),
        "left_out": texts.left_out,
    }


def _encoded(texts: list[list[str]], tokenizer: "PreTrainedTokenizerFast", max_length: int) -> Iterator[Any]:
    for start in range(0, len(texts[0]), CHUNK):
        part = [column[start : start + CHUNK] for column in texts]
        options: dict[str, Any] = {"return_token_type_ids": True, "return_attention_mask": False}
        yield tokenizer(*part, truncation=True, max_length=max_length, **options)
    tokenizer.backend_tokenizer.no_truncation()  # it keeps the length otherwise, and its digest changes
