"""Every file of a stopped run, of teachers and of their answers, damaged in six ways: refused by name, or passed over, saying so;
and a resumed run is the same run, or none. Caches and studies: tests/unit/test_corruption.py.

`pytest -m slow -s` prints the table.
"""

import collections
import hashlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_core.runs import folders
from kd_core.system.files import file_digest
from tests import warm
from tests.conftest import ROOT, cpu_environment
from tests.recipes.conftest import SMALL, documents, numbers
from tests.recipes.test_bad_input import Harmful
from tests.unit.test_corruption import delete, empty, flip, foreign, truncate

BERT: list[Any] = [
    ROOT / "recipes/bert_kd.py",
    *SMALL,
    *"--steps 6 --eval-every 3 --deepspeed-config zero1.json".split(),
]
IMAGES: list[Any] = [
    ROOT / "recipes/resnet_kd.py",
    *(
        "--preset cifar --steps 2 --global-batch-size 32 --micro-batch-size 16 --log-every 1 --eval-every 2 "
        "--save-every 2 --workers 0"
    ).split(),
]
CAUSAL: list[Any] = [
    ROOT / "recipes/causal_lm_kd.py",
    *(
        "--vocab-size 512 --seq-len 32 --steps 2 --global-batch-size 8 --micro-batch-size 4 --log-every 1 --eval-every 2 "
        "--deepspeed-config zero0_fp32_cpu.json"
    ).split(),
]
METHOD = "--steps 2 --global-batch-size 32 --micro-batch-size 16 --log-every 1 --eval-every 2 --workers 0".split()


def run(words: list[Any], cwd: Path, cache: Path) -> tuple[int, str]:
    """Exit code of a command, and what it said."""
    cwd.mkdir(parents=True, exist_ok=True)
    command, env = [sys.executable, *map(str, words)], cpu_environment(KD_CACHE=str(cache), PYTHONPATH=str(ROOT))
    done = warm.run(command, cwd=cwd, env=env)
    return done.returncode, done.stdout + done.stderr


def made(words: list[Any], cwd: Path, cache: Path) -> None:
    code, said = run(words, cwd, cache)
    assert code == 0, said


@dataclass
class Thing:
    """What is damaged: the files `names` below `root`; the `command` that reads them then, and what came of it.

    `{case}` in the command is the folder in which it runs, to which `root` and the cache have been copied.
    """

    root: Path
    foreign: Path  # another of the kind
    command: list[Any]
    names: list[str]
    outcome: Callable[[Path, str], Any]  # of the folder and what was said; equal only where nothing has changed
    cache: Path


def outcome_of_run(folder: Path, _: str) -> Any:
    return numbers(folder / "run"), hashlib.sha256((folder / "run/hf/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> dict[str, Thing]:
    home = tmp_path_factory.mktemp("things")
    cache = home / "cache"
    texts = documents(300)
    (home / "texts.txt").write_text("\n\n".join(texts))
    (home / "others.txt").write_text("\n\n".join(texts[100:]))
    (home / "zero1.json").write_text('{"zero_optimization": {"stage": 1}}')
    bert = [str(word).replace("zero1.json", str(home / "zero1.json")) for word in BERT]
    mine = [*bert, "--data", home / "texts.txt"]
    images = [*IMAGES, "--student", "resnet8", "--data", image_folder]
    causal = [*CAUSAL, "--data", home / "texts.txt"]
    both = [ROOT / "recipes/logits/bd_kd.py", *METHOD, "--save-every", 1, "--keep", 2, "--data", image_folder]
    for name, words in {
        "stopped": [*mine, "--seed", 1],
        "foreign": [*mine, "--seed", 2],
        "teacher": [*mine, "--seed", 3, "--student", "mini"],
        "other_teacher": [*mine, "--seed", 4, "--student", "mini"],
        "image_teacher": [*images, "--seed", 3],
        "other_image_teacher": [*images, "--seed", 4],
        "causal_teacher": [*causal, "--seed", 3, "--student", "2x64"],
        "other_causal_teacher": [*causal, "--seed", 4, "--student", "1x128"],
        "both": [*both, "--seed", 1],
        "other_both": [*both, "--seed", 2],
    }.items():
        made([*words, "--out", home / name], home / "work", cache)
    shutil.copytree(home / "stopped", home / "whole")
    for name in ("stopped", "foreign"):
        stop_at(home / name, 3)
    for name in ("", "other_"):
        stop_at(home / f"{name}both", 1)
        words = [
            "-m",
            "kd_core.cache",
            "build",
            "--kind",
            "images",
            "--preset",
            "cifar",
            "--data",
            image_folder,
            "--micro-batch-size",
            16,
        ]
        words += [
            "--teacher",
            home / f"{name}image_teacher",
            "--view-patterns",
            1,
            "--out",
            home / f"{name}image_answers",
        ]
        made(words, home / "work", cache)
        flags = "build --vocab-size 512 --seq-len 32 --micro-batch-size 4 --teacher-dtype fp32 --mask-patterns 1"
        words = ["-m", "kd_core.cache", *flags.split()]
        words += ["--data", home / "texts.txt", "--teacher", home / f"{name}teacher", "--out", home / f"{name}answers"]
        made(words, home / "work", cache)
    taught = [*mine, "--steps", 3, "--kd-ratio", 0.5, "--teacher-dtype", "fp32", "--out", "{case}/run", "--teachers"]
    resumed = [ROOT / "recipes/bert_kd.py", "--out", "{case}/run", "--resume"]
    newest = "checkpoints/step00000003"
    of_teacher = ["run.json", "hf/config.json", "hf/model.safetensors"]
    found: dict[str, Thing] = {
        "a stopped run": Thing(
            home / "stopped", home / "foreign", resumed,
            ["run.json", "metrics.jsonl", *(f"{newest}/{file.name}" for file in sorted((home / "stopped" / newest).iterdir()))],
            outcome_of_run, cache,
        ),
        "a teacher": Thing(
            home / "teacher", home / "other_teacher", [*taught, "{case}/teacher"],
            [*of_teacher, "hf/tokenizer.json", "hf/tokenizer_config.json", "metrics.jsonl"], outcome_of_run, cache,
        ),
        "an image teacher": Thing(
            home / "image_teacher", home / "other_image_teacher",
            [*images, "--kd-ratio", 0.5, "--teachers", "{case}/image_teacher", "--out", "{case}/run"], of_teacher, outcome_of_run, cache,
        ),
        "answers": Thing(
            home / "answers", home / "other_answers", [*taught, "cache:{case}/answers"],
            of_cache(home / "answers"), outcome_of_run, cache,
        ),
        # What other recipes have besides.
        "a causal teacher": Thing(
            home / "causal_teacher", home / "other_causal_teacher",
            [*causal, "--student", "1x64", "--kd-ratio", 0.5, "--teacher-dtype", "fp32", "--out", "{case}/run", "--teachers",
             "{case}/causal_teacher"],
            [*of_teacher[1:], "hf/generation_config.json"], outcome_of_run, cache,
        ),
        "two engines": Thing(
            home / "both", home / "other_both", [both[0], "--out", "{case}/run", "--resume"],
            sorted(str(file.relative_to(home / "both")) for file in (home / "both/checkpoints/step00000001/teacher").iterdir()),
            outcome_of_run, cache,
        ),
        "answers on images": Thing(
            home / "image_answers", home / "other_image_answers",
            [ROOT / "recipes/logits/pld.py", *METHOD, "--data", image_folder, "--teachers", "cache:{case}/image_answers", "--teacher-dtype", "fp32", "--out", "{case}/run"],
            of_cache(home / "image_answers"), outcome_of_run, cache,
        ),
    }  # fmt: skip
    return found


def of_cache(folder: Path) -> list[str]:
    """Its files, one part of them."""
    names = sorted(file.name for file in folder.iterdir())
    return [name for name in names if name == "part-00000.bin" or not name.startswith("part-")]


def stop_at(folder: Path, step: int) -> None:
    """Makes of a finished run one that was killed after its checkpoint of `step`."""
    for path in (folder / "checkpoints").glob("step*"):
        if path.name != f"step{step:08d}":
            shutil.rmtree(path)
    shutil.rmtree(folder / "hf")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 1]))
    record = folders.read_record(folder)
    folders.write_record(
        folder, {name: record[name] for name in record if name not in ("result", "files")} | {"saved": step}
    )


def payload(file: Path, _: Path) -> None:
    """Code in place of the file, and digests that fit, as of somebody who has made all of it."""
    code = Harmful(str(next(folder for folder in file.parents if folder.name == "case") / "was_run"))
    if file.suffix == ".pt":
        torch.save({"module": code}, file)
    else:
        file.write_bytes(pickle.dumps(code))
    folder = next((parent for parent in file.parents if parent.name.startswith("step")), file.parent)
    if folder.name.startswith("step") and file.name != "manifest.json":
        digests = {str(path.relative_to(folder)): file_digest(path) for path in folder.rglob("*.pt")}
        (folder / "manifest.json").write_text(json.dumps(digests))
    elif (folder / "header.json").exists() and file.name != "manifest.json":
        sums = {
            path.name: file_digest(path)
            for path in folder.iterdir()
            if path.name not in ("manifest.json", "build.json")
        }
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({"score": manifest["score"], "sha256": sums}))
    elif folder.name == "hf":
        record = folders.read_record(folder.parent)
        folders.write_record(folder.parent, record | {"files": folders.digests(folder.parent)})


def laid_out(thing: Thing, case: Path) -> tuple[Path, list[str]]:
    """A copy of the thing in the folder `case`, and the command there."""
    shutil.copytree(thing.cache, case / "cache")
    target = case / ("run" if "--resume" in thing.command else thing.root.name)
    shutil.copytree(thing.root, target)
    return target, [str(word).replace("{case}", str(case)) for word in thing.command]


def verdict(code: int, said: str, names: tuple[str, ...], same: bool) -> str:
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if "Traceback" in said or (code and len(errors) != 1):
        return "TRACEBACK"
    if code:
        return "refused" if any(name in errors[0] for name in names) else "UNNAMED"
    if not same:
        return "said" if any(f"{names[0]} is gone" in line for line in said.splitlines()) else "SILENT"
    damaged = ("damaged", "is gone", "to make")
    return "rebuilt" if any(any(word in line for word in damaged) for line in said.splitlines()) else "harmless"


KINDS = (
    "a stopped run",
    "a teacher",
    "an image teacher",
    "answers",
    "a causal teacher",
    "two engines",
    "answers on images",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_silent_and_none_a_traceback(kind: str, things: dict[str, Thing], tmp_path: Path) -> None:
    thing = things[kind]
    _, words = laid_out(thing, tmp_path / "whole")
    code, said = run(words, tmp_path / "whole", tmp_path / "whole" / "cache")
    assert code == 0, said
    right, table, wrong = thing.outcome(tmp_path / "whole", said), collections.Counter[str](), []
    for name in thing.names:
        for damage in (flip, truncate, delete, empty, foreign, payload):
            if damage is foreign and (thing.foreign / name).read_bytes() == (thing.root / name).read_bytes():
                continue
            case = tmp_path / "case"
            target, words = laid_out(thing, case)
            damage(target / name, thing.foreign / name)
            code, said = run(words, case, case / "cache")
            same = code == 0 and thing.outcome(case, said) == right
            answer = verdict(code, said, (name.split("/")[-1], str(target)), same)
            if damage is payload:  # what fits in every digest need not be told from what was meant
                answer = {"SILENT": "no code", "UNNAMED": "no code"}.get(answer, answer)
            if (case / "was_run").exists():
                answer = "EXECUTED"
            table[answer] += 1
            last = [line for line in said.splitlines() if line.startswith("error") or "damaged" in line][-1:]
            print(f"{kind:22} {name:60} {damage.__name__:9} {answer:9} {last}", flush=True)
            if answer.isupper():
                wrong.append(f"{name}, {damage.__name__}: {answer}: {said[-1500:]}")
            shutil.rmtree(case)
    print(kind, dict(table), flush=True)
    assert not wrong, "\n\n".join(wrong)
    assert table.total() >= 4 * len(thing.names)


# --- the same run, or none --------------------------------------------------------------------------------------------


def checkpoints_gone(run: Path, _: dict[str, Thing]) -> list[str]:
    shutil.rmtree(run / "checkpoints" / "step00000003")
    return []


def checkpoint_of_another(run: Path, things: dict[str, Thing]) -> list[str]:
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(things["a stopped run"].foreign / "checkpoints", run / "checkpoints")
    return []


def before_the_first_checkpoint(run: Path, things: dict[str, Thing]) -> list[str]:
    checkpoints_gone(run, things)
    record = folders.read_record(run)
    folders.write_record(run, {name: record[name] for name in record if name != "saved"})
    return []


def data_moved(run: Path, things: dict[str, Thing]) -> list[str]:
    shutil.copy(things["a stopped run"].root.parent / "texts.txt", run.parent / "moved.txt")
    return ["--data", str(run.parent / "moved.txt")]


def data_changed(run: Path, things: dict[str, Thing]) -> list[str]:
    return ["--data", str(things["a stopped run"].root.parent / "others.txt")]


def config_renamed(run: Path, _: dict[str, Thing]) -> list[str]:
    (run.parent / "renamed.json").write_text('{"zero_optimization":\n{"stage":1}}')
    return ["--deepspeed-config", str(run.parent / "renamed.json")]


def config_changed(run: Path, _: dict[str, Thing]) -> list[str]:
    (run.parent / "zero1.json").write_text('{"zero_optimization": {"stage": 2}}')
    return ["--deepspeed-config", str(run.parent / "zero1.json")]


def half_of_the_tokens_overwritten(run: Path, _: dict[str, Thing]) -> list[str]:
    for file in (run.parent / "cache").glob("corpus-*/train.bin"):
        with file.open("r+b") as rows:
            rows.write(b"\1" * (file.stat().st_size // 2))
    return []


def zeros_after_a_crash(run: Path, _: dict[str, Thing]) -> list[str]:
    with (run / "metrics.jsonl").open("ab") as log:
        log.write(b"\0" * 4096)
    return []


def log_removed(run: Path, _: dict[str, Thing]) -> list[str]:
    (run / "metrics.jsonl").unlink()
    return []


GOES_ON: dict[Callable[[Path, dict[str, Thing]], list[str]], str] = {
    before_the_first_checkpoint: "has no checkpoint yet, so it begins again",
    data_moved: "from step 3",
    config_renamed: "from step 3",
    half_of_the_tokens_overwritten: "train.bin is damaged",
    zeros_after_a_crash: "from step 3",
    log_removed: "metrics.jsonl is gone: the log begins after step 3",
}
ENDS = {
    checkpoints_gone: "the run had saved step 3",
    checkpoint_of_another: "is not of the run that",
    data_changed: "--data does not hold what the run began with",
    config_changed: 'has zero_optimization {"stage": 2}, the run began with {"stage": 1}',
}


@pytest.mark.slow
@pytest.mark.parametrize("change", [*GOES_ON, *ENDS], ids=lambda change: change.__name__)
def test_a_resumed_run_is_the_same_run_or_none(change: Any, things: dict[str, Thing], tmp_path: Path) -> None:
    thing, whole = things["a stopped run"], things["a stopped run"].root.parent / "whole"
    case = tmp_path / "case"
    root, words = laid_out(thing, case)
    code, said = run([*words, *change(root, things)], case, case / "cache")
    assert (GOES_ON | ENDS)[change] in said, said
    assert code == (2 if change in ENDS else 0), said
    if change in GOES_ON:
        weights = "hf/model.safetensors"
        assert (root / weights).read_bytes() == (whole / weights).read_bytes()
    if change not in (*ENDS, log_removed):
        assert numbers(root) == numbers(whole)


@pytest.mark.slow
def test_a_student_may_lie_elsewhere_and_is_no_other(things: dict[str, Thing], tmp_path: Path) -> None:
    thing = things["a teacher"]
    data = next(word for word in thing.command if str(word).endswith("texts.txt"))
    shutil.copytree(thing.root, tmp_path / "student")
    words = [
        *BERT[:-2],
        "--steps",
        3,
        "--data",
        data,
        "--save-every",
        2,
        "--out",
        tmp_path / "run",
        "--student",
        tmp_path / "student",
    ]
    made([*words, "--deepspeed-config", data.parent / "zero1.json"], tmp_path, thing.cache)
    right = outcome_of_run(tmp_path, "")
    stop_at(tmp_path / "run", 2)
    (tmp_path / "student").rename(tmp_path / "moved")
    resumed = [ROOT / "recipes/bert_kd.py", "--out", str(tmp_path / "run"), "--resume", "--student"]
    for other in (str(thing.foreign), "mini"):
        code, said = run([*resumed, other], tmp_path, thing.cache)
        assert code == 2 and f"--student {other} is not what the run began with" in said, said
    code, said = run([*resumed, str(tmp_path / "moved")], tmp_path, thing.cache)
    assert code == 0 and "from step 2" in said, said
    assert f"--student was {tmp_path / 'student'} and is now {tmp_path / 'moved'}" in said
    assert outcome_of_run(tmp_path, "") == right


@pytest.mark.slow
def test_teachers_may_lie_elsewhere_and_are_no_others(things: dict[str, Thing], tmp_path: Path) -> None:
    thing = things["a teacher"]
    words = [str(word).replace("{case}", str(tmp_path)) for word in thing.command]
    shutil.copytree(thing.root, tmp_path / "teacher")
    made([*words, "--save-every", "2"], tmp_path, thing.cache)
    right = outcome_of_run(tmp_path, "")
    stop_at(tmp_path / "run", 2)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    resumed = [ROOT / "recipes/bert_kd.py", "--out", str(tmp_path / "run"), "--resume", "--teachers"]
    code, said = run([*resumed, str(thing.foreign)], tmp_path, thing.cache)
    assert code == 2 and f"--teachers {thing.foreign} is not what the run began with" in said, said
    code, said = run([*resumed, str(tmp_path / "moved")], tmp_path, thing.cache)
    assert code == 0 and "from step 2" in said, said
    assert outcome_of_run(tmp_path, "") == right
