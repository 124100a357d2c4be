"""Every file of a cache and a study, damaged in six ways: refused by name, or made anew, saying so. Runs: tests/recipes."""

import collections
import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kd_core import compare, plan
from kd_core.images import sources as images
from kd_core.runs import folders, lean
from kd_core.runs.design import read_study
from kd_core.runs.sources import _check_exported
from kd_core.system import checked, files
from kd_core.text import causal, corpus
from recipes.bert_kd import Config
from recipes.causal_lm_kd import Config as CausalConfig
from tests.conftest import photo_folder
from tests.recipes.conftest import documents
from tests.recipes.test_bad_input import Harmful


@dataclasses.dataclass
class Thing:
    """What is damaged: the files `names` below `root`, of which `foreign` is another, and what reads them."""

    root: Path
    foreign: Path
    names: list[str]
    read: Callable[[Path], Any]


def cached(pattern: str, mine: Callable[[], Any], theirs: Callable[[], Any], home: Path, patch: Any) -> Thing:
    """A folder of the cache; the damaged copy lies in a cache of its own."""
    roots = []
    for name, make in (("cache", mine), ("other", theirs)):
        patch.setenv("KD_CACHE", str(home / name))
        make()
        roots += [path for path in (home / name).glob(pattern) if path.is_dir()]

    def read(case: Path) -> Any:
        for path in (home / "cache").iterdir():
            if path.is_dir() and path.name != case.name:
                shutil.copytree(path, case.parent / path.name)
        patch.setenv("KD_CACHE", str(case.parent))
        return mine()

    return Thing(roots[0], roots[1], sorted(file.name for file in roots[0].iterdir()), read)


def texts(home: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    home.mkdir()
    for name, first in (("mine", 0), ("theirs", 50)):
        (home / f"{name}.txt").write_text("\n\n".join(documents(150)[first:]))

    def prepare(name: str) -> Any:
        made = corpus.prepare(str(home / f"{name}.txt"), tokenizer=None, vocab_size=400, seq_len=32, progress=True)
        return made.fingerprint, made.rows(0).tobytes(), made.validation.tobytes(), made.tokenizer.get_vocab()

    return lambda: prepare("mine"), lambda: prepare("theirs")


def tokens(home: Path, patch: Any) -> Thing:
    return cached("corpus-*", *texts(home), home, patch)


def a_tokenizer(home: Path, patch: Any) -> Thing:
    return cached("tokenizer-*", *texts(home), home, patch)


def causal_texts(home: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Of the kind that a file's first record says, prompts and responses."""
    home.mkdir()
    for name, first in (("mine", 0), ("theirs", 50)):
        lines = [json.dumps({"prompt": text[:20], "completion": text[20:40]}) for text in documents(150)[first:]]
        (home / f"{name}.jsonl").write_text("\n".join(lines))

    def prepare(name: str) -> Any:
        made = causal.build(CausalConfig(data=str(home / f"{name}.jsonl"), vocab_size=400, seq_len=64))
        return made.fingerprint, made.rows(0).tobytes(), made.validation.tobytes(), made.tokenizer.get_vocab()

    return lambda: prepare("mine"), lambda: prepare("theirs")


def causal_tokens(home: Path, patch: Any) -> Thing:
    return cached("causal-*", *causal_texts(home), home, patch)


def what_records_are(home: Path, patch: Any) -> Thing:
    return cached("kind-*", *causal_texts(home), home, patch)


def pixels(home: Path, patch: Any) -> Thing:
    folders = [photo_folder(home / name, ("ant", "bee"), train=count, val=2) for name, count in (("a", 4), ("b", 5))]

    def prepare(folder: Path) -> Any:
        made = images.prepare(str(folder), decoded_gib=1, max_corrupt=0.0, progress=True)
        parts = [made.train, made.validation]
        return (
            made.fingerprint,
            made.classes,
            [(part.labels.tobytes(), np.array(part.pixels).tobytes()) for part in parts],
        )

    return cached("images-*", lambda: prepare(folders[0]), lambda: prepare(folders[1]), home, patch)


def finished_run(folder: Path, seed: int, **flags: Any) -> None:
    cfg = Config(seed=seed, steps=4, log_every=1, eval_every=2, out=str(folder), **flags)
    (folder / "hf").mkdir(parents=True)
    lines = [
        {"step": step, "samples": step, "loss": seed / step, "kd_ratio": 0.0, "teacher": []} for step in range(1, 5)
    ]
    lines = [line | {"train_s": line["step"] * 1.5, "teacher_s": 0.0, "data_s": 0.0} for line in lines]
    for line in lines[1::2]:
        line["eval/loss"] = (seed + cfg.lr) / line["step"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file({"w": torch.full((3, seed), 1.0)}, folder / "hf" / "model.safetensors")
    result = {**lines[-1], "stopped": "finished", "peak_memory_gib": 1.0}
    record = folders.describe("bert_kd", cfg) | {"result": result, "files": folders.digests(folder)}
    folders.write_record(folder, record)


def studied(home: Path) -> list[Path]:
    claim = dict.fromkeys(("setting", "criterion", "paper"), "x") | {"arm": "taught", "against": "alone"}
    entries = {"recipe": "recipes/bert_kd.py", "arms": {"alone": "", "taught": "--lr 2"}, "baseline": "alone"}
    for name, shift in (("study", 0), ("other", 7)):
        for arm, lr in (("alone", 1.0), ("taught", 2.0)):
            for seed in (1, 2):
                finished_run(home / name / arm / "4" / str(seed), seed + shift, lr=lr)
        (home / name / "study.json").write_text(
            json.dumps({**entries, "lengths": [4], "seeds": [1, 2], "claim": claim})
        )
        lean.write(home / name, collected(home / name))
    return [home / "study", home / "other"]


def collected(study: Path) -> dict[str, lean.Lean]:
    names = [f"{arm}/4/{seed}" for arm in ("alone", "taught") for seed in (1, 2)]
    return {name: lean.of_run(study / name, study) for name in names}


def a_study_compared(home: Path, _: Any) -> Thing:
    def read(case: Path) -> Any:
        there = lean.read(case)
        if not there:  # as kd_core.compare's main
            raise FileNotFoundError(f"{case} has no runs.json")
        return compare.told(read_study(case / "study.json"), there)

    return Thing(*studied(home), ["runs.json", "runs.csv"], read)


def a_study_that_goes_on(home: Path, _: Any) -> Thing:
    return Thing(*studied(home), ["alone/4/1/run.json", "alone/4/1/metrics.jsonl"], collected)


def a_run_measured(home: Path, _: Any) -> Thing:
    study, other = studied(home)
    names = ["run.json", "metrics.jsonl", "hf/model.safetensors"]
    read = lambda case: (plan._load(case)[1], plan._parameters(case))
    return Thing(study / "alone/4/1", other / "alone/4/1", names, read)


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(file: Path, _: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete(file: Path, _: Path) -> None:
    file.unlink()


def empty(file: Path, _: Path) -> None:
    file.write_bytes(b"")


def foreign(file: Path, theirs: Path) -> None:
    shutil.copy(theirs, file)


def payload(file: Path, _: Path) -> None:
    """Code in place of the file, and digests that fit, as of somebody who has made all of it."""
    code = Harmful(str(next(folder for folder in file.parents if folder.name == "case") / "was_run"))
    if file.suffix == ".npy":
        np.save(file, np.array([code], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps(code))
    if (file.parent / files.DIGESTS).exists() and file.name != files.DIGESTS:
        names = [path.name for path in file.parent.iterdir() if path.name != files.DIGESTS]
        facts = {"of": file.parent.name, "sha256": checked.digests(file.parent, names)}
        (file.parent / files.DIGESTS).write_text(json.dumps(facts))


KINDS = (
    tokens,
    a_tokenizer,
    causal_tokens,
    what_records_are,
    pixels,
    a_study_compared,
    a_study_that_goes_on,
    a_run_measured,
)
DAMAGES = (flip, truncate, delete, empty, foreign, payload)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_damage_is_silent_and_none_a_traceback(
    kind: Callable[[Path, Any], Thing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(files, "_SOUND", set())
    thing, case = kind(tmp_path / "home", monkeypatch), tmp_path / "case"
    shutil.copytree(thing.root, case / thing.root.name)
    right, table, wrong = thing.read(case / thing.root.name), collections.Counter[str](), []
    for name in thing.names:
        for damage in DAMAGES:
            shutil.rmtree(case)
            target = shutil.copytree(thing.root, case / thing.root.name)
            damage(target / name, thing.foreign / name)
            files._SOUND.clear()
            _check_exported.cache_clear()
            capsys.readouterr()
            try:
                same, said = thing.read(target) == right, capsys.readouterr().err
                made = "rebuilt" if "anew" in said and (name in said or files.DIGESTS in said) else "harmless"
                answer = made if same else "SILENT"
            except (ValueError, OSError) as error:  # what one_line_errors takes
                said = str(error)
                answer = "refused" if Path(name).name in said or str(target) in said else "UNNAMED"
            if damage is payload:  # what fits in every digest need not be told from what was meant
                answer = {"UNNAMED": "no code"}.get(answer, answer)
            if (case / "was_run").exists():
                answer = "EXECUTED"
            table[answer] += 1
            if answer.isupper() or (answer == "harmless" and damage is not foreign):
                wrong.append(f"{name}, {damage.__name__}: {answer}: {said}")
    with capsys.disabled():
        print(kind.__name__, dict(table), end=" ")
    assert not wrong, "\n".join(wrong)
    assert table.total() == len(DAMAGES) * len(thing.names)
