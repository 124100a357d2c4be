"""The ResNet recipe end to end on the CPU: window, batch normalisation over ranks, exact resume, export, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from kd_core.images import batches as images
from kd_core.images import classifiers, resnets
from kd_core.images import sources as image_sources
from recipes.resnet_kd import main
from tests import warm
from tests.conftest import ROOT
from tests.recipes.conftest import Attempt, metrics, start, trace, wait_for_step

RECIPE = ROOT / "recipes" / "resnet_kd.py"
SMALL = (
    "--preset cifar --steps 8 --global-batch-size 16 --micro-batch-size 8 --lr 0.05 --log-every 1 --eval-every 4 "
    "--save-every 3"
).split()
Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def train(image_folder: Path, cache: Path) -> Train:
    """Runs the recipe with the small flags and those given, on `ranks` ranks."""

    def run(*words: object, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
        flags = [*SMALL, "--data", str(image_folder), *map(str, words)]
        done = warm.ranks(ranks, [RECIPE, *flags], KD_CACHE=str(cache))
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="module")
def teacher(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train("--out", folder, "--student", "resnet14", "--steps", 4)
    return folder


@pytest.fixture(scope="module")
def distilled(train: Train, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, the window open for the first half, two teachers."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    train("--out", folder, "--teachers", teacher, teacher / "hf", "--kd-ratio", 0.9, "--kd-stop", 0.5)
    return folder


def evals(folder: Path) -> list[tuple[Any, ...]]:
    """Every evaluated number of a run, by step."""
    lines = [line for line in metrics(folder) if "eval/loss" in line]
    return [tuple(value for name, value in line.items() if name.startswith("eval/")) for line in lines]


def test_run_folder_and_window(distilled: Path, teacher: Path) -> None:
    run = json.loads((distilled / "run.json").read_text())
    assert (run["recipe"], run["result"]["stopped"]) == ("resnet_kd", "finished")
    assert [t["name"] for t in run["teachers"]] == [str(teacher), str(teacher / "hf")]
    final = evals(teacher)[-1]
    scores = [value for name, value in run["teachers"][0].items() if name.startswith("eval/")]
    assert tuple(scores) == pytest.approx(final, rel=1e-4)
    lines = metrics(distilled)
    needed = "samples loss label_loss kd_loss kd_ratio lr grad_norm teacher train_s teacher_s data_s".split()
    assert all(set(needed) <= set(line) for line in lines)
    for line in lines[:4]:
        assert line["loss"] == pytest.approx(0.1 * line["label_loss"] + 0.9 * line["kd_loss"])
        assert line["kd_loss"] > 0 and len(line["teacher"]) == 1
    assert all(line["loss"] == line["label_loss"] and line["teacher"] == [] for line in lines[4:])
    assert {line["teacher_s"] for line in lines[4:]} == {lines[3]["teacher_s"]}


def test_the_export_is_the_student(distilled: Path, image_folder: Path, cache: Path) -> None:
    os.environ["KD_CACHE"] = str(cache)
    data = image_sources.prepare(str(image_folder), decoded_gib=2, max_corrupt=0)
    net, config = classifiers.load_net(str(distilled), "--teachers")
    model = resnets.Classifier(net).eval()
    correct = loss = 0.0
    for micro in images.load(images.ValidationBatches(data.validation, 32, 32, 50, 0, 1), range(3), workers=0):
        with torch.no_grad():
            logits = model(micro.pixels)
        loss += float(torch.nn.functional.cross_entropy(logits, micro.labels, reduction="sum"))
        correct += int((logits.argmax(-1) == micro.labels).sum())
    last = metrics(distilled)[-1]
    assert loss / 120 == pytest.approx(last["eval/loss"], rel=1e-5)
    assert correct / 120 == pytest.approx(last["eval/accuracy"])
    assert config["classes"] == [f"class{number}" for number in range(10)]


def test_a_torchvision_student_exports_a_torchvision_state_dict(train: Train, tmp_path: Path) -> None:
    flags = ["--student", "resnet18", "--train-size", 48, "--eval-resize", 64, "--eval-size", 48, "--crop", "resized"]
    train("--out", tmp_path / "run", *flags, "--blurpool", "--steps", 1, "--data", "synthetic:4x64")
    state = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    torchvision.models.resnet18(num_classes=4).load_state_dict(state)


def test_ratio_0_is_bit_identical_to_no_teacher(train: Train, teacher: Path, tmp_path: Path) -> None:
    train("--out", tmp_path / "without", "--steps", 4)
    train("--out", tmp_path / "ratio0", "--steps", 4, "--teachers", teacher, "--kd-ratio", 0)
    assert trace(tmp_path / "without") == trace(tmp_path / "ratio0")


@pytest.mark.slow
def test_kill_9_on_two_ranks_then_resume_gives_the_same_trace(
    train: Train, teacher: Path, image_folder: Path, cache: Path, tmp_path: Path
) -> None:
    """With everything that has state: batch normalisation on ranks of their own, moving average, teachers' window."""
    flags = ["--teachers", teacher, "--kd-ratio", 0.9, "--kd-stop", 0.5, "--steps", 12, "--micro-batch-size", 4]
    flags += ["--ema-half-life", 2, "--mixup", 0.2, "--cutmix", 1, "--label-smoothing", 0.1]
    flags += ["--deepspeed-config", "zero1_bf16.json"]
    train("--out", tmp_path / "whole", *flags, ranks=2)
    words = [RECIPE, *SMALL, "--data", image_folder, *flags, "--out", tmp_path / "killed"]
    started = warm.begin(2, words, tmp_path, KD_CACHE=str(cache))
    wait_for_step(tmp_path / "killed", 5, started[0])
    warm.kill(started)
    resumed = warm.ranks(2, [RECIPE, "--out", tmp_path / "killed", "--resume"], KD_CACHE=str(cache))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    assert evals(tmp_path / "killed") == evals(tmp_path / "whole")
    assert len(trace(tmp_path / "whole")) == 12
    for folder in ("hf", "best"):
        one, other = (load_file(tmp_path / run / folder / "model.safetensors") for run in ("killed", "whole"))
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_behind_its_window_a_run_resumes_without_its_teacher(train: Train, teacher: Path, tmp_path: Path) -> None:
    source = shutil.copytree(teacher / "hf", tmp_path / "model")
    flags = ["--teachers", source, "--kd-ratio", 0.9, "--kd-stop", 0.125]
    train(*flags, "--out", tmp_path / "run", "--max-minutes", 0.0001)
    shutil.rmtree(source)
    train("--out", tmp_path / "run", "--resume", "--max-minutes", 10)
    assert len(trace(tmp_path / "run")) == 8


def test_a_teacher_that_answers_nan_is_refused_in_one_line(train: Train, teacher: Path, tmp_path: Path) -> None:
    source = shutil.copytree(teacher / "hf", tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["fc.bias"].fill_(float("nan"))
    save_file(weights, source / "model.safetensors")
    done = train("--teachers", source, "--kd-ratio", 0.9, "--out", tmp_path / "run", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: --teachers {source} answers with no finite numbers" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_signal_to_the_whole_process_group_saves_a_checkpoint(
    image_folder: Path, cache: Path, tmp_path: Path
) -> None:
    """As `timeout`, systemd and Slurm send it: to the workers that decode, too."""
    flags = [*SMALL, "--data", image_folder, "--steps", 5000, "--decoded-gib", 0, "--workers", 1]
    process = start(cache, sys.executable, RECIPE, *flags, "--out", tmp_path / "run")
    wait_for_step(tmp_path / "run", 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(120) == 0, process.stderr and process.stderr.read()
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    assert result["stopped"] == "SIGTERM"
    assert list((tmp_path / "run" / "checkpoints").glob(f"*{result['step']}"))


def losses(folder: Path) -> list[float]:
    return [line[name] for line in metrics(folder) for name in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def one_rank(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two micro-batches of 8 a step."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train("--out", folder)
    return folder


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_two_ranks_equal_one_on_every_zero_stage(stage: int, train: Train, one_rank: Path, tmp_path: Path) -> None:
    """With the same micro-batches the weights move alike; only the running statistics of evaluation differ.

    On one rank they take in two micro-batches a step one after the other, on two ranks the mean of both.
    """
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    train("--out", tmp_path / "two", "--deepspeed-config", config, ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(one_rank), rel=2e-4)
    assert evals(tmp_path / "two")[-1][0] == pytest.approx(evals(one_rank)[-1][0], rel=0.1)


@pytest.mark.slow
def test_synchronised_batch_normalisation_on_two_ranks_equals_one_rank(train: Train, tmp_path: Path) -> None:
    """Twice 8 images normalised together are one micro-batch of 16, running statistics included."""
    train("--out", tmp_path / "one", "--micro-batch-size", 16)
    train("--out", tmp_path / "two", "--sync-bn", ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert [e[0] for e in evals(tmp_path / "two")] == pytest.approx([e[0] for e in evals(tmp_path / "one")], rel=1e-3)


@pytest.mark.slow
def test_decoupled_decay_is_the_same_on_every_zero_stage(train: Train, tmp_path: Path) -> None:
    runs = []
    for stage in (0, 1, 3):
        config = tmp_path / f"{stage}.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        folder = tmp_path / f"stage{stage}"
        train("--out", folder, "--deepspeed-config", config, "--decoupled", "--weight-decay", 0.2, "--steps", 4)
        runs.append(losses(folder))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert runs[2] == pytest.approx(runs[0], rel=1e-4)


@pytest.mark.slow
def test_a_teacher_split_by_zero_3_teaches_as_a_whole_one(train: Train, teacher: Path, tmp_path: Path) -> None:
    flags = ["--teachers", teacher, "--kd-ratio", 0.9, "--teacher-dtype", "bf16", "--steps", 2]
    for placement in ("device", "zero3"):
        train("--out", tmp_path / placement, *flags, "--teacher-placement", placement, ranks=2)
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "device"), rel=0.02)


def test_zero_3_in_bf16_on_two_ranks_runs_and_exports(train: Train, tmp_path: Path) -> None:
    train("--out", tmp_path / "run", "--deepspeed-config", "zero3_bf16.json", "--micro-batch-size", 8, ranks=2)
    state = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert state["conv1.weight"].dtype == torch.bfloat16
    assert state["bn1.running_mean"].dtype == torch.float32 and state["bn1.running_mean"].abs().max() > 0
    resnets.build_net("resnet8", 10).load_state_dict(state)


def test_corrupt_images_are_named_replaced_and_stop_the_run_above_a_threshold(
    train: Train, image_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(image_folder, data)
    damaged = sorted((data / "train").rglob("*.jpg"))[::40]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:200])
    flags = ["--data", data, "--decoded-gib", 0, "--workers", 1, "--steps", 30, "--max-corrupt"]
    done = train("--out", tmp_path / "run", *flags, 0.5)
    named = [line for line in done.stderr.splitlines() if "corrupt image" in line]
    assert {line.split()[4].rstrip("(") for line in named} == {str(file.relative_to(data)) for file in damaged}
    assert sum(line["corrupt_images"] for line in metrics(tmp_path / "run")) == len(named) == len(damaged)
    done = train("--out", tmp_path / "stopped", *flags, 0.005, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    result = json.loads((tmp_path / "stopped" / "run.json").read_text())["result"]
    assert result["stopped"] == "corrupt-images" and "3 images" in result["error"]


@pytest.fixture
def attempt(
    tmp_path: Path,
    image_folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Attempt:
    monkeypatch.setenv("KD_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return Attempt(main, [*SMALL, "--data", image_folder], tmp_path, capsys)


def test_bad_flags(attempt: Attempt) -> None:
    assert "--preset must be one of ['baseline-90', 'cifar', 'mild-36'], got hot" in attempt("--preset", "hot")
    assert "--eval-size must be at most --eval-resize, 32, got 64" in attempt("--eval-size", 64)
    assert "--label-smoothing must be in [0, 1)" in attempt("--label-smoothing", 1)
    assert "--workers must be at least 0 (1 with --randaugment)" in attempt("--randaugment", 9, "--workers", 0)
    assert "--global-batch-size must be at most" in attempt("--global-batch-size", 1024)
    message = attempt("--ema-half-life", 2, "--deepspeed-config", "zero3_bf16.json")
    assert "--ema-half-life 2 needs ZeRO stage 2 or below, zero3_bf16.json has 3; choose another file" in message
    assert "--ema-half-life must be at most a quarter of --steps, 2, got 3" in attempt("--ema-half-life", 3)
    assert "--student resnet9 is no folder" in attempt("--student", "resnet9")


def test_bad_data(attempt: Attempt, image_folder: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in attempt("--data", "./nowhere")
    assert "synthetic:CLASSESxSIDE" in attempt("--data", "synthetic:10")
    (tmp_path / "empty").mkdir()
    assert "0 images in 0 class folders" in attempt("--data", tmp_path / "empty")
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"no tar" * 1000)
    assert "is no uncompressed tar" in attempt("--data", broken)
    table = tmp_path / "table.parquet"
    table.write_bytes(b"no table")
    assert "cannot be read as parquet" in attempt("--data", table)
    data = tmp_path / "images"
    shutil.copytree(image_folder, data)
    for file in (data / "train").rglob("*1.jpg"):
        file.write_bytes(b"")
    assert "images are corrupt" in attempt("--data", data)


def test_bad_teachers(attempt: Attempt, teacher: Path, tmp_path: Path) -> None:
    kd = ("--kd-ratio", 0.5, "--teachers")
    assert "no model of torchvision" in attempt(*kd, "resnet51")
    assert "has the weights" in attempt(*kd, "resnet50:IMAGENET1K_V9")
    assert "knows the 1000 classes of ImageNet, the data has 10" in attempt(*kd, "resnet50")
    for name in ("./nowhere", "timm/resnet50"):
        assert f"--teachers {name} is no folder and no model of torchvision" in attempt(*kd, name)
    shallow = tmp_path / "shallow"
    shutil.copytree(teacher / "hf", shallow)
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps(config | {"model": "resnet8"}))
    assert re.search(r'cannot be loaded: .*key\(s\) in state_dict: "layer', attempt(*kd, shallow))
    broken = tmp_path / "broken"
    shutil.copytree(teacher / "hf", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{broken} cannot be loaded" in attempt(*kd, broken)
    (broken / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    assert "its config.json describes no classifier" in attempt(*kd, broken)
    other = attempt(*kd, teacher, "--data", "synthetic")
    assert "was trained on 10 classes (class0, ...), the data has 10 (0, ...)" in other
