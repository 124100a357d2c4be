"""GLUE's metrics against scikit-learn and scipy, its files read and refused, protocols, tokens and batches."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics

from kd_core.glue import report as glue_report
from kd_core.glue import tasks as glue
from kd_core.text.tokenizer import load_tokenizer, train_wordpiece
from tests.conftest import DATA

GLUE = DATA / "glue"
real = pytest.mark.skipif(not GLUE.is_dir(), reason=f"needs {GLUE}")
random = np.random.default_rng(0)
CLASSES = random.integers(0, 2, 200), random.integers(0, 2, 200)
SCORES = random.uniform(0, 5, 200).round(1), random.uniform(0, 5, 200).round(1)  # rounded: ties


def test_metrics_equal_scikit_learn_and_scipy() -> None:
    predictions, labels = CLASSES
    assert glue.metric("accuracy", predictions, labels) == metrics.accuracy_score(labels, predictions)
    assert glue.metric("f1", predictions, labels) == metrics.f1_score(labels, predictions)
    assert glue.metric("matthews", predictions, labels) == metrics.matthews_corrcoef(labels, predictions)
    predictions, labels = SCORES
    assert glue.metric("pearson", predictions, labels) == stats.pearsonr(labels, predictions).statistic
    assert glue.metric("spearman", predictions, labels) == stats.spearmanr(labels, predictions).statistic


def test_metrics_equal_their_definitions() -> None:
    predictions, labels = CLASSES
    tp, fp, fn, tn = (int(((predictions == p) & (labels == y)).sum()) for p, y in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert glue.metric("f1", predictions, labels) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue.metric("matthews", predictions, labels) == pytest.approx((tp * tn - fp * fn) / root)
    assert glue.metric("pearson", *SCORES) == pytest.approx(np.corrcoef(*SCORES)[0, 1])


@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.filterwarnings("error")
def test_metrics_of_one_class(constant: int) -> None:
    _, labels = CLASSES
    predictions = np.full(len(labels), constant)
    assert glue.metric("matthews", predictions, labels) == metrics.matthews_corrcoef(labels, predictions) == 0
    assert glue.metric("f1", predictions, labels) == metrics.f1_score(labels, predictions, zero_division=0.0)
    assert glue.metric("f1", np.zeros(9), np.zeros(9)) == 0
    assert glue.metric("accuracy", predictions, labels) == (labels == constant).mean()
    assert glue.metric("pearson", predictions.astype(float), SCORES[1]) == 0
    assert glue.metric("spearman", predictions.astype(float), SCORES[1]) == 0


def test_every_task_has_its_official_metrics() -> None:
    said = {task.name: " ".join(task.metrics) for task in glue.TASKS.values()}
    accuracy = dict.fromkeys(("SST-2", "MNLI", "QNLI", "RTE", "WNLI"), "accuracy")
    both = dict.fromkeys(("MRPC", "QQP"), "accuracy f1")
    assert said == accuracy | both | {"CoLA": "matthews", "STS-B": "pearson spearman"}
    assert glue.TASKS["MNLI"].evaluated == ["dev", "dev-mm"]
    assert glue.score(glue.TASKS["MNLI"], "dev-mm", *CLASSES).keys() == {"accuracy-mm"}


def test_flags_go_over_the_protocol() -> None:
    flags = {"epochs": ["CoLA=7", "3"], "lr": ["RTE=2e-5"], "seeds": ["1"], "max_length": []}
    settings = glue.task_settings("sane", ["CoLA", "RTE"], flags)
    assert settings["CoLA"] == glue.Settings(4e-5, 0.0, 16, 7, 1, 128)
    assert settings["RTE"] == glue.Settings(2e-5, 0.0, 16, 3, 1, 128)
    assert glue.task_settings("mosaic", ["RTE"], {})["RTE"] == glue.Settings(1e-5, 1e-5, 16, 3, 5, 256)


@pytest.mark.parametrize(
    ("protocol", "tasks", "flags", "message"),
    [
        ("sane", ["COLA"], {}, "--tasks COLA: no task of GLUE; choose from CoLA, SST-2,"),
        ("mosaic", ["WNLI"], {}, "--tasks WNLI: the mosaic protocol does not have it, only MNLI,"),
        ("sane", ["CoLA"], {"epochs": ["cola=3"]}, "--epochs cola: no task of GLUE"),
        ("sane", ["CoLA"], {"epochs": ["RTE=3"]}, "--epochs RTE=3: RTE is not evaluated; leave it out"),
        ("sane", ["CoLA"], {"epochs": ["1.5"]}, "--epochs 1.5 must be a whole number of at least 1"),
        ("sane", ["CoLA"], {"batch_size": ["CoLA=0"]}, "--batch-size CoLA=0 must be a whole number of at least 1"),
        ("sane", ["CoLA"], {"lr": ["0"]}, "--lr 0 must be a number above 0"),
        ("sane", ["CoLA"], {"lr": ["nan"]}, "--lr nan must be a number above 0"),
        ("sane", ["CoLA"], {"max_length": ["4"]}, "--max-length 4 must be a whole number of at least 8"),
    ],
)
def test_flags_that_will_not_do(protocol: str, tasks: list[str], flags: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        glue.task_settings(protocol, tasks, flags)
    assert message in str(error.value)


def test_the_table_says_what_is_left_out_and_who_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    job: Any = SimpleNamespace(input=SimpleNamespace(task="QQP"))
    control = {"QQP": {"accuracy": 0.63, "f1": 0.0}}
    plan: Any = SimpleNamespace(
        skipped={}, left_out={"QQP": {"dev": 1}}, protocol="sane", settings={"QQP": None}, control=control, jobs=[job]
    )
    swapped = {"eval/accuracy": 0.098, "eval/f1": 0.071}  # a good teacher, its two columns exchanged
    monkeypatch.setattr(glue_report, "result", lambda job: {"teacher": swapped})
    first, *_, last = glue_report._notes(plan, ["QQP"])
    assert first == "QQP: rows that lack columns are left out, 1 of dev."
    assert last.startswith("The teacher of QQP: accuracy 9.8 f1 7.1, not above the majority class; its labels may")


@real
def test_the_real_files() -> None:
    counts = {}
    for name in ("CoLA", "SST-2", "STS-B", "WNLI"):
        task = glue.TASKS[name]
        assert glue.missing(task, str(GLUE)) is None
        for split in ("train", "dev", "test"):
            texts = glue.read_split(task, split, str(GLUE))
            counts[name, split] = len(texts.labels), sum(label == 1 for label in texts.labels)
            assert {len(column) for column in texts.texts} == {len(texts.labels)} and len(texts.texts) == len(
                task.texts
            )
            assert (set(texts.labels) == {-1}) == (split == "test")
            assert texts.numbers == list(range(len(texts.labels)))
    assert counts["CoLA", "train"] == (8551, 6023) and counts["CoLA", "dev"] == (1043, 721)
    assert counts["CoLA", "test"] == (1063, 0)
    assert counts["SST-2", "train"] == (67349, 37569) and counts["SST-2", "dev"] == (872, 444)
    assert counts["WNLI", "train"] == (635, 312) and counts["WNLI", "dev"] == (71, 31)
    assert [counts["STS-B", split][0] for split in ("train", "dev", "test")] == [5749, 1500, 1379]
    assert np.mean(glue.read_split(glue.TASKS["STS-B"], "dev", str(GLUE)).labels) == pytest.approx(2.364, abs=1e-3)
    quoted = [text for text in glue.read_split(glue.TASKS["STS-B"], "train", str(GLUE)).texts[0] if '"' in text]
    assert quoted, "quotation marks were taken for the csv module's"
    assert glue.missing(glue.TASKS["QNLI"], str(GLUE)) == "no QNLI/train.tsv"
    assert glue.missing(glue.TASKS["RTE"], str(GLUE)) == "no RTE/train.tsv"


# What the original files of the tasks that are not at hand look like.
ORIGINAL = {
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t7\t8\tHe said "no\tHe said no', "0\t1\t2\tA\tB"],
        [["He said \"no", "A"], ["He said no", "B"]],
        [1, 0],
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["9\t1\t2\tHow?\tWhy?\t0", "8\t3\t4\tWho?\tWho is?\t1"],
        [["How?", "Who?"], ["Why?", "Who is?"]],
        [0, 1],
    ),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        ["0\t1\t1e\tx\t(\t(\t(\t(\tIt is.\tIt was.\tneutral\tneutral", "1\t1\t1e\tx\t(\t(\t(\t(\tA\tB\tx\tcontradiction"],
        [["It is.", "A"], ["It was.", "B"]],
        [1, 2],
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel",
        ["0\tWhat?\tThat.\tentailment", "1\tA\tB\tnot_entailment"],
        [["What?", "A"], ["That.", "B"]],
        [0, 1],
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tOne.\tTwo.\tnot_entailment", "1\tA\tB\tentailment"],
        [["One.", "A"], ["Two.", "B"]],
        [1, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINAL)
def test_files_in_the_original_layout(name: str, tmp_path: Path) -> None:
    header, rows, texts, labels = ORIGINAL[name]
    task = glue.TASKS[name]
    for split in ("train", *task.evaluated):
        file = tmp_path / task.splits[split].file
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8", newline="")
        assert glue.read_split(task, split, str(tmp_path)) == glue.Texts(texts, labels, [0, 1])
    assert glue.missing(task, str(tmp_path)) is None


def test_a_few_broken_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    header, rows, *_ = ORIGINAL["QQP"]
    (tmp_path / "QQP").mkdir()
    for split in ("train", "dev", "test"):
        lines = [header, *rows * 100, "9\t1\t2\tcut off"]
        (tmp_path / "QQP" / f"{split}.tsv").write_text("\n".join(lines))
    for split in ("train", "dev"):
        read = glue.read_split(glue.TASKS["QQP"], split, str(tmp_path))
        assert (len(read.labels), read.left_out) == (200, 1)
    with pytest.raises(ValueError, match=r"test.tsv has 1 of 201 rows with fewer columns than 5"):
        glue.read_split(glue.TASKS["QQP"], "test", str(tmp_path))  # a submission needs them all


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("SST-2", "text\tlabel\nfine\t1\n", "SST-2/train.tsv has no column 'sentence', only ['text', 'label']"),
        ("SST-2", "sentence\tlabel\nfine\t2\n", "SST-2/train.tsv, line 2: label '2' is none of SST-2's labels 0, 1"),
        ("SST-2", "sentence\tlabel\n", "SST-2/train.tsv has no rows"),
        ("SST-2", "", "SST-2/train.tsv has no column 'sentence', only []"),
        ("CoLA", "gj04\t1\t\tfine\ngj04\t*\t\tfine\n", "CoLA/train.tsv, line 2: label '*' is none of CoLA's labels"),
        ("CoLA", "sentence\tlabel\nfine\t1\n", "CoLA/train.tsv has 2 of 2 rows with fewer columns than 4"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\t5.5\n", "line 2: score '5.5' is no number from 0 to 5"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: score 'nan' is no number from 0 to 5"),
        ("RTE", b"index\tsentence1\tsentence2\tlabel\n0\t\xff\tb\tentailment\n", "RTE/train.tsv is not UTF-8 text"),
    ],
)
def test_files_that_will_not_do(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "train.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        glue.read_split(glue.TASKS[name], "train", str(tmp_path))
    assert message in str(error.value)


def test_the_hub_has_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, config: str, split: str) -> Any:
        assert (name, config) == ("nyu-mll/glue", "mnli") and split in ("train", "test_mismatched")
        label = [1, 2] if split == "train" else [-1, -1]
        columns = {"premise": ["It is.", "A"], "hypothesis": ["It was.", "B"], "label": label, "idx": [0, 1]}
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(glue, "require_hub", lambda what: None)
    task = glue.TASKS["MNLI"]
    assert glue.read_split(task, "train", glue.HUB) == glue.Texts(ORIGINAL["MNLI"][2], [1, 2], [0, 1])
    assert glue.read_split(task, "test-mm", glue.HUB).labels == [-1, -1]
    with pytest.raises(ValueError, match="has labels outside 0 to 0"):
        glue.read_split(task._replace(labels=("entailment",)), "train", glue.HUB)


def test_the_hub_s_labels_of_test_splits_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """MRPC's are the true ones there, all others -1."""
    import datasets

    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0], "idx": [0, 1]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(columns))
    monkeypatch.setattr(glue, "require_hub", lambda what: None)
    assert glue.read_split(glue.TASKS["MRPC"], "test", glue.HUB).labels == [-1, -1]


def test_a_test_file_s_numbers(tmp_path: Path) -> None:
    file = tmp_path / "RTE" / "test.tsv"
    file.parent.mkdir()
    file.write_text("sentence1\tsentence2\tindex\na\tb\t7\n")
    assert glue.read_split(glue.TASKS["RTE"], "test", str(tmp_path)).numbers == [7]
    file.write_text("sentence1\tsentence2\tindex\na\tb\tx0\n")
    with pytest.raises(ValueError, match=r"RTE/test\.tsv, line 2: index 'x0' is no number"):
        glue.read_split(glue.TASKS["RTE"], "test", str(tmp_path))
    file.write_text("sentence1\tsentence2\tindex\na\tb\n")
    with pytest.raises(ValueError, match="1 of 1 rows with fewer columns than 3"):
        glue.read_split(glue.TASKS["RTE"], "test", str(tmp_path))


def test_batches_are_the_tokenizer_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    texts = [["a cat sat on the mat", "no"], ["the mat", "a very long sentence that has to be cut somewhere"]]
    lines = [
        "index\tsentence1\tsentence2\tlabel",
        *(f"{i}\t{a}\t{b}\t{i}" for i, (a, b) in enumerate(zip(*texts, strict=True))),
    ]
    (tmp_path / "WNLI").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "WNLI" / f"{split}.tsv").write_text("\n".join(lines))
    file = tmp_path / "tokenizer.json"
    train_wordpiece(texts[0] + texts[1], 120).save(str(file))
    ours = load_tokenizer(str(file))
    name = glue.tokenise(glue.TASKS["WNLI"], str(tmp_path), ours, 12)
    assert glue.tokenise(glue.TASKS["WNLI"], str(tmp_path), ours, 16) != name
    monkeypatch.setattr(glue, "read_split", lambda *_: pytest.fail("tokenised again"))
    assert glue.tokenise(glue.TASKS["WNLI"], str(tmp_path), ours, 12) == name
    splits = glue.examples(name)
    assert splits.keys() == {"train", "dev"}
    assert splits["dev"].labels.tolist() == [0, 1]
    options: Any = dict(truncation=True, max_length=12, padding=True, return_tensors="pt", return_token_type_ids=True)
    for order in ([0, 1], [1, 0], [1]):
        expected = ours([texts[0][i] for i in order], [texts[1][i] for i in order], **options)
        ids, types, mask = splits["train"].batch(torch.tensor(order))
        assert torch.equal(mask, expected["attention_mask"])
        assert torch.equal(types, expected["token_type_ids"])
        assert torch.equal(ids * mask, expected["input_ids"] * mask)
    assert splits["train"].batch(torch.tensor([0]), multiple=8)[0].shape[1] % 8 == 0


def test_pieces_waste_least(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    lengths = random.integers(2, 60, 400)
    arrays = {name: np.zeros(400) for name in ("firsts", "labels", "numbers")}
    np.savez(tmp_path / "train.npz", tokens=np.zeros(lengths.sum(), np.int32), ends=lengths.cumsum(), **arrays)
    examples = glue.Examples(tmp_path / "train.npz")

    def cost(groups: Any, overhead: int) -> int:
        return int(sum(len(group) * max(lengths[group]) + overhead for group in groups))

    for overhead in (0, 20, 64, 10_000):
        rows = torch.from_numpy(random.permutation(400)[:9])
        pieces = [piece.numpy() for piece in examples.pieces(rows, overhead)]
        assert sorted(np.concatenate(pieces)) == sorted(rows.numpy())
        ordered = rows.numpy()[np.argsort(lengths[rows])]
        cuts = [[n for n in range(1, 9) if chosen >> n & 1] for chosen in range(0, 512, 2)]  # all 256 ways
        assert cost(pieces, overhead) == min(cost(np.split(ordered, cut), overhead) for cut in cuts)
        assert len(pieces) == 1 or overhead < 10_000
    assert len(examples.pieces(torch.tensor([7]), 64)) == 1
