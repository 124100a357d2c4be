"""Files of others that hold what they cannot: no code of theirs is run, and the error is one line that names them."""

import argparse
import contextlib
import functools
import gzip
import io
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig

from kd_core import cli, plan
from kd_core.glue import tasks as glue
from kd_core.images import classifiers
from kd_core.images import sources as images
from kd_core.runs import design, folders, lean
from kd_core.system.files import file_digest
from kd_core.text import documents, packing, tokenizer
from kd_core.text.bert import MaskedBert
from kd_core.text.causal_tokenizer import load_causal_tokenizer
from kd_core.text.pretrained import load_pretrained
from kd_core.time_to_quality import comparison
from kd_core.training import checkpoints, ds_config
from kd_core.training.plain import PlainEngine
from recipes.bert_kd import Config
from tests.conftest import ROOT, cpu_environment
from tests.recipes.test_bad_input import Harmful

JSON: dict[str, bytes] = {
    "empty": b"",
    "NUL": b"\0" * 4096,
    "nested": b"[" * 100_000,
    "nested object": b'{"a":' * 100_000,
    "digits": b'{"config": ' + b"9" * 5000 + b"}",
    "Latin-1": b'{"config": "\xe9"}',
    "surrogate": b'{"\\ud800": "\\udfff"}',
    "list": b"[]",
    "null": b"null",
    "number": b"1e999",
    "text": b'"config"',
    "cut": b'{"config": {"lr": ',
}


# What a file may be all the same, by reader: tokens and rows are judged by what becomes of the text.
HARMLESS: dict[str, tuple[str, ...]] = {
    "--data .json": ("empty", "list"),
    "--data .jsonl": ("empty",),
    "a tokenizer's config": ("surrogate",),
    "vocab.txt": ("empty", "NUL"),
    "--chat-template": ("empty", "NUL"),
    "rows of text": ("NUL", "noise"),
}
Damage = Callable[[Path], None]
Reader = Callable[[Path, Damage], Any]  # of a folder, in which one file is damaged before it is read


def small_bert(folder: Path) -> Path:
    MaskedBert(BertConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        folder
    )
    return folder


def of_model(name: str) -> Reader:
    def read(folder: Path, damage: Damage) -> Any:
        damage(small_bert(folder) / name)
        return load_pretrained(MaskedBert, str(folder), 64)

    return read


def of_classifier(name: str) -> Reader:
    def read(folder: Path, damage: Damage) -> Any:
        config = {"model": "resnet8", "blurpool": False, "classes": ["a", "b"]}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").touch()
        damage(folder / name)
        return classifiers.load_net(str(folder), "--student")

    return read


def of_file(name: str, read: Callable[[Path], Any]) -> Reader:
    def damaged(folder: Path, damage: Damage) -> Any:
        damage(folder / name)
        return read(folder / name)

    return damaged


def of_packer(name: str) -> Reader:
    def read(folder: Path, damage: Damage) -> Any:
        packing.MaskedPacker(tokenizer.train_wordpiece(["some words"] * 3, 64), 64, 16, 1, 2).save(folder)
        damage(folder / name)
        return packing.Packer.load(folder)

    return read


def of_tokenizer(name: str) -> Reader:
    def read(folder: Path, damage: Damage) -> Any:
        tokenizer.train_wordpiece(["some words"] * 3, 64).save(str(folder / "tokenizer.json"))
        damage(folder / name)
        return tokenizer.load_tokenizer(str(folder))

    return read


OF_JSON: dict[str, Reader] = {
    "--load": of_file("run.json", lambda file: cli.parse(Config, ["--load", str(file)])),
    "--resume": of_file("run.json", lambda file: cli.parse(Config, ["--resume", "--out", str(file.parent)])),
    "a run": of_file("run.json", lambda file: folders.read_record(file.parent)),
    "a run to plan with": of_file("run.json", lambda file: plan._load(file.parent)),
    "a run to compare": of_file(
        "run.json", lambda file: comparison.load(file.parent, "eval/loss", lower_is_better=True)
    ),
    "a study": of_file("study.json", design.read_study),
    "a study's runs": of_file("runs.json", lambda file: lean.read(file.parent)),
    "--deepspeed-config": of_file("ds.json", lambda file: ds_config.read_config(str(file))),
    "--data .json": of_file("a.json", lambda file: list(documents.read_file(file))),
    "--data .jsonl": of_file("a.jsonl", lambda file: list(documents.read_file(file))),
    "a model's config": of_model("config.json"),
    "a model's index": of_model("model.safetensors.index.json"),
    "a classifier's config": of_classifier("config.json"),
    "tokenizer.json": of_file("tokenizer.json", lambda file: tokenizer.load_tokenizer(str(file))),
    "a tokenizer's config": of_tokenizer("tokenizer_config.json"),
    "a packer's facts": of_packer("packer.json"),
    "a packer's tokens": of_packer("tokenizer.json"),
}


def damaged_by(content: bytes) -> Damage:
    def damage(file: Path) -> None:
        file.write_bytes(content)

    return damage


def told(reader: Reader, folder: Path, damage: Damage) -> str:
    """What a reader says of a damaged file in `folder`; "" where the file may be taken for what it is to be."""
    folder.mkdir()
    try:
        reader(folder, damage)
    except (ValueError, OSError) as error:  # what becomes one line and exit code 2
        line = cli.told(error)
        assert str(folder) in line and len(line) < 1000, line
        return line
    return ""


@pytest.mark.parametrize("content", JSON)
@pytest.mark.parametrize("reader", OF_JSON)
def test_what_is_no_such_json_is_one_line(reader: str, content: str, tmp_path: Path) -> None:
    assert told(OF_JSON[reader], tmp_path / "of_others", damaged_by(JSON[content])) or content in HARMLESS.get(
        reader, ()
    )


def test_quickstart_names_a_design_that_is_none(tmp_path: Path) -> None:
    script = (ROOT / "launch/quickstart.sh").read_text().split("<<'END'\n")[1].split("END\n")[0]
    (tmp_path / "design.json").write_bytes(JSON["nested"])
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "design.json", tmp_path / "out.json"],
        env=cpu_environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path}/design.json is damaged"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out.json").exists()


# --- bytes ------------------------------------------------------------------------------------------------------------


def checkpoint(name: str, read: Callable[[Path], Any]) -> Reader:
    """Of a checkpoint whose manifest holds, as of somebody who has made all of it."""

    def of(folder: Path, damage: Damage) -> Any:
        step = folder / "step00000001"
        step.mkdir()
        torch.save({"module": {}, "optimizer": {}}, step / "plain.pt")
        torch.save({"module": {}}, step / "mp_rank_00_model_states.pt")
        torch.save({}, step / "state.pt")
        damage(step / name)
        (step / "manifest.json").write_text(json.dumps({file.name: file_digest(file) for file in step.glob("*.pt")}))
        return read(step)

    return of


def plain(step: Path) -> Any:
    engine = argparse.Namespace(module=torch.nn.Linear(1, 1))
    engine.load_checkpoint = functools.partial(PlainEngine.load_checkpoint, engine)
    return checkpoints.load(step.parent, step.name, engine, "student", first=True)


def pickled_weights(folder: Path, damage: Damage) -> Any:
    (small_bert(folder) / "model.safetensors").unlink()
    damage(folder / "pytorch_model.bin")
    return load_pretrained(MaskedBert, str(folder), 64)


def vocabulary(folder: Path, damage: Damage) -> Any:
    damage(folder / "vocab.txt")
    return tokenizer.load_tokenizer(str(folder))


def table(task: glue.Task, name: str) -> Reader:
    def read(folder: Path, damage: Damage) -> Any:
        damage(folder / name)
        return glue.read_split(task, "train", str(folder))

    return read


def texts(name: str) -> Reader:
    return of_file(name, lambda file: list(documents.read_file(file)))


def photos(name: str) -> Reader:
    return of_file(name, lambda file: images.prepare(str(file), decoded_gib=0, max_corrupt=0.0, progress=False))


OF_BYTES: dict[str, Reader] = {
    "a model's weights": of_model("model.safetensors"),
    "a model's pickled weights": pickled_weights,
    "a classifier's weights": of_classifier("model.safetensors"),
    "a run's weights, to plan with": of_file("hf/model.safetensors", lambda file: plan._parameters(file.parents[1])),
    "a checkpoint of the plain engine": checkpoint("plain.pt", plain),
    "a checkpoint's state": checkpoint("state.pt", checkpoints.read_state),
    "a checkpoint's weights": checkpoint("mp_rank_00_model_states.pt", checkpoints.read_checkpoint),
    "vocab.txt": vocabulary,
    "SentencePiece": of_file("a.model", lambda file: tokenizer.load_tokenizer(str(file))),
    "--chat-template": of_file("a.jinja", lambda file: load_causal_tokenizer("bytes", str(file))),
    "tokens of GLUE": of_file("train.npz", glue.Examples),
    "a table of GLUE": table(glue.TASKS["SST-2"], "SST-2/train.tsv"),
    "rows of text": of_file("validation.bin", packing.MaskedPacker(Tokenizer(WordLevel()), 64, 16, 1, 2).open),
    "lines of a study": of_file("runs.csv", lambda file: (file.with_name("runs.json").write_text(RUNS), lean.read(file.parent))),
    "images in parquet": photos("train.parquet"),
    "images in a tar": photos("photos.tar"),
    **{f"--data {name}": texts(name) for name in ("a.parquet", "a.txt.gz", "a.txt.xz", "a.txt.bz2", "a.jsonl.zst", "a.json.lz4")},
}  # fmt: skip
RUNS = json.dumps({"all": {"config": {}}, "arms": {"a": {}}, "runs": {"a/1/1": {"result": {}}}})


def code(kind: str, mark: Path) -> bytes:
    """A file that runs code when it is unpickled."""
    file = io.BytesIO()
    if kind == "torch":
        torch.save({"module": Harmful(str(mark))}, file)
    elif kind == "npy":
        np.save(file, np.array([Harmful(str(mark))], dtype=object), allow_pickle=True)
    elif kind == "npz":
        np.savez(
            file, **dict.fromkeys(("tokens", "ends", "firsts", "labels", "numbers"), np.array([Harmful(str(mark))]))
        )  # type: ignore[arg-type]
    elif kind == "gz":
        return gzip.compress(pickle.dumps(Harmful(str(mark))))
    else:
        return pickle.dumps(Harmful(str(mark)))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["pickle", "torch", "npy", "npz", "gz", "empty", "NUL", "noise"])
@pytest.mark.parametrize("reader", OF_BYTES)
def test_bytes_of_others_run_no_code_and_are_one_line(reader: str, kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    fixed = {"empty": b"", "NUL": b"\0" * 4096, "noise": random.Random(0).randbytes(4096)}
    content = fixed[kind] if kind in fixed else code(kind, mark)

    def damage(file: Path) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)

    said = told(OF_BYTES[reader], tmp_path / "of_others", damage)
    assert not mark.exists()
    assert said or kind in HARMLESS.get(reader, ())


def test_the_payloads_run_where_nobody_looks(tmp_path: Path) -> None:
    """Or the tests above would show nothing."""
    for kind in ("pickle", "torch", "npy"):
        content = io.BytesIO(code(kind, tmp_path / kind))
        with contextlib.suppress(Exception):
            {"pickle": pickle.load, "torch": lambda f: torch.load(f, weights_only=False)}.get(
                kind, lambda f: np.load(f, allow_pickle=True)
            )(content)
        assert (tmp_path / kind).exists()
