"""A small real corpus and short runs of the BERT recipe, each in a process of its own."""

import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from kd_core.cache.records import Layout, read_header
from kd_core.images import classifiers
from kd_core.images.resnets import Classifier, build_net
from tests import warm
from tests.conftest import ROOT, cpu_environment

RECIPE = ROOT / "recipes" / "bert_kd.py"
SMALL = (
    "--student tiny --vocab-size 512 --seq-len 32 --steps 8 --global-batch-size 8 --micro-batch-size 4 --lr 1e-3 "
    "--deepspeed-config zero0_fp32_cpu.json --log-every 1 --eval-every 4 --save-every 3"
).split()


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One .txt, documents separated by blank lines."""
    file = tmp_path_factory.mktemp("corpus") / "documents.txt"
    file.write_text("\n\n".join(documents(300)), encoding="utf-8")
    return file


def documents(count: int) -> list[str]:
    """The same text on every machine: sentences of made-up words, as often as words are, each word followed by few others."""
    draw = random.Random(0)
    parts = "ba bri co cle di dun fe fro gu gal ha hir jo ki kos lu lem me mur no nas pa plo ra rek se sti ti tra vu wen zo".split()
    words = ["".join(draw.choices(parts, k=draw.choice((1, 2, 2, 3)))) for _ in range(1500)]
    often = [1 / (place + 3) for place in range(len(words))]
    after = {word: draw.choices(words, often, k=6) for word in words}

    def sentence() -> str:
        said = draw.choices(words, often)
        while len(said) < draw.randint(5, 14):
            said.append(draw.choice(after[said[-1]]))
        return " ".join(said).capitalize() + "."

    return ["\n".join(" ".join(sentence() for _ in range(5)) for _ in range(draw.randint(1, 9))) for _ in range(count)]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def train(corpus_file: Path, cache: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python recipes/bert_kd.py` with the small flags and those given."""

    def run(*words: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(RECIPE), *SMALL, "--data", str(corpus_file), *map(str, words)]
        env = cpu_environment(KD_CACHE=str(cache), **environment)
        done = warm.run(command, env=env)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="session")
def teacher(train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, used as a teacher."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train("--out", folder, "--steps", 4, "--student", "mini")
    return folder


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small tasks in GLUE's layout whose labels follow from their texts; of QNLI a dev set alone."""
    folder = tmp_path_factory.mktemp("glue")
    sentences = itertools.cycle(line for text in documents(3) for line in text.splitlines())
    sizes = {"train": 24, "dev": 12, "dev_matched": 12, "dev_mismatched": 10, "test": 5, "test_matched": 5}
    files = dict.fromkeys(("CoLA", "STS-B", "WNLI", "RTE"), ("train", "dev", "test"))
    files |= {"MNLI": ("train", "dev_matched", "dev_mismatched", "test_matched"), "QNLI": ("dev",)}
    labels = {"RTE": ["entailment", "not_entailment"], "MNLI": ["entailment", "neutral", "contradiction"]}
    labels |= {"QNLI": labels["RTE"], "STS-B": ["0.000", "2.500", "5.000"]}
    header = {"STS-B": "score", "MNLI": "gold_label"}
    for name, splits in files.items():
        (folder / name).mkdir()
        for split in splits:
            rows = []
            for i in range(sizes[split]):
                label = labels.get(name, ["0", "1"])[i % len(labels.get(name, "01"))]
                first, second = f"{next(sentences)} {label} {label}", f"{label} {next(sentences)}"
                if name == "CoLA":
                    rows.append(f"{i}\t{first}" if split == "test" else f"gj04\t{label}\t\t{first}")
                else:
                    rows.append("\t".join([str(i), first, second, label][: 3 if split.startswith("test") else 4]))
            if name != "CoLA" or split == "test":
                texts = {"CoLA": "sentence", "QNLI": "question\tsentence"}.get(name, "sentence1\tsentence2")
                last = "" if split.startswith("test") else "\t" + header.get(name, "label")
                rows.insert(0, f"index\t{texts}{last}")
            (folder / name / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trace(folder: Path) -> list[tuple[Any, ...]]:
    """What must be equal to the last digit between runs that compute the same."""
    names = ("step", "loss", "label_loss", "kd_loss", "kd_ratio", "lr", "grad_norm", "teacher", "eval/loss")
    return [tuple(line.get(name) for name in names) for line in metrics(folder)]


def numbers(folder: Path) -> list[list[Any]]:
    """The trace without the names of teachers."""
    return [[value for value in line if not isinstance(value, list)] for line in trace(folder)]


def start(cache: Path, *words: object) -> subprocess.Popen[str]:
    env = cpu_environment(KD_CACHE=str(cache))
    return warm.Popen([*map(str, words)], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (
        (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= step
    ):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, f"no step {step} within two minutes"
        time.sleep(0.02)


def killed_and_resumed(flags: Sequence[object], cache: Path, folder: Path, *kill_at: int) -> Path:
    """Runs a recipe on 2 ranks as a whole; again, killed at step `kill_at`; resumes that and compares the traces.

    Args:
        kill_at: as often as steps are given.

    Returns:
        The folder of the whole run.
    """
    whole = warm.ranks(2, [RECIPE, *flags, "--out", folder / "whole"], KD_CACHE=str(cache))
    assert whole.returncode == 0, whole.stderr[-3000:]
    for step in kill_at:
        killed = folder / f"killed{step}"
        started = warm.begin(2, [RECIPE, *flags, "--out", killed], folder, KD_CACHE=str(cache))
        wait_for_step(killed, step, started[0])
        warm.kill(started)
        resumed = warm.ranks(2, [RECIPE, "--out", killed, "--resume"], KD_CACHE=str(cache))
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        assert trace(killed) == trace(folder / "whole"), f"killed at step {step}"
    return folder / "whole"


def check_killed_build(whole: Path, words: Sequence[object], cache: Path, folder: Path) -> None:
    """Builds a cache into `folder` alone, killed after some parts, then under the launcher; compares it with `whole`."""
    build = ["-m", "kd_core.cache", "build", *words, "--out", folder]
    process = start(cache, sys.executable, *build)
    while len(list(folder.glob("part-*.json"))) < 5:
        assert process.poll() is None, process.stderr and process.stderr.read()
    process.kill()
    process.wait()
    parts = len(list(folder.glob("part-*.json")))
    done = warm.ranks(1, build, KD_CACHE=str(cache))
    assert done.returncode == 0, done.stderr[-3000:]
    layout = Layout(**read_header(whole)["layout"])
    assert f"{layout.num_records - parts * layout.part_records} to compute on 1 rank(s)" in done.stderr
    for file in whole.iterdir():
        if file.name != "build.json":
            assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


class Attempt:
    """Runs a recipe's `main` in this process with small flags, in `folder`, expecting one line and exit code 2."""

    def __init__(
        self, main: Callable[..., int], flags: list[object], folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.main, self.flags, self.folder, self.capsys = main, flags, folder, capsys

    def __call__(self, *words: object) -> str:
        with pytest.raises(SystemExit) as end:
            self.main([*map(str, self.flags), "--out", "run", *map(str, words)])
        captured = self.capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 2, captured.err
        assert len(lines) == 1, captured.err
        assert "Traceback" not in captured.err
        assert not (self.folder / "run").exists(), "a half-made run folder was left"
        return lines[0]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """480 training and 120 validation scans of digits at 32 x 32 as JPEG files, <split>/<class>/<number>.jpg."""
    root = tmp_path_factory.mktemp("images")
    digits = load_digits()
    for number, (scan, label) in enumerate(zip(digits.images[:600], digits.target[:600], strict=True)):
        folder = root / ("train" if number < 480 else "val") / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((scan * (255 / 16)).astype("uint8")).resize((32, 32), Image.Resampling.BICUBIC)
        image.convert("RGB").save(folder / f"{number:04d}.jpg", quality=95)
    return root


def guessing(folder: Path, seed: int, classes: int = 10) -> Path:
    """A classifier of random weights that is sure of its guesses, so that of two neither is the best alone."""
    torch.manual_seed(seed)
    net = build_net("resnet8", classes)
    net.fc.weight.data *= 20
    folder.mkdir()
    whole = Classifier(net, mean=[0.5] * 3, std=[0.5] * 3)
    classifiers.save(folder, whole, net.state_dict(), list(map(str, range(classes))), image_size=32)
    return folder
