"""The GLUE recipe: one command from pretrained runs to a table; killed, resumed, distilled, of checkpoints; bad input."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from kd_core.glue import models
from kd_core.glue import plan as glue_plan
from kd_core.glue import tasks as glue
from kd_core.glue.plan import FineTuning
from kd_core.runs import jobs
from kd_core.runs.folders import read_record, write_record
from kd_core.text.tokenizer import load_tokenizer
from kd_core.time_to_quality import comparison as time_to_quality
from kd_core.training import checkpoints
from recipes import glue as recipe
from tests import warm
from tests.benchmarks import glue_step
from tests.conftest import ROOT, cpu_environment
from tests.recipes.conftest import SMALL, metrics
from tests.recipes.test_bad_input import Harmful
from tests.recipes.test_every_recipe import command, header, run

FAST = ["--batch-size", "8", "--epochs", "1", "--seeds", "1", "--max-length", "24", "--lr", "1e-3"]


@pytest.fixture(scope="session")
def student(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints at steps 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("student") / "run"
    train("--out", folder, "--keep", 3)
    return folder


@pytest.fixture
def evaluate(glue_folder: Path, cache: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts launch/glue.sh on the small tasks, two jobs at a time."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def start(*words: object) -> subprocess.Popen[str]:
        command = ["bash", ROOT / "launch" / "glue.sh", *words, "--data", glue_folder, "--jobs", 2]
        env = cpu_environment(KD_CACHE=str(cache), PATH=path)
        pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=env, **pipes)

    return start


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What the process says on stdout and stderr until it ends with `code`."""
    said = process.communicate(timeout=500)
    assert process.returncode == code, said[1][-3000:]
    return said


def record(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "glue.json").read_text()))


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if key != "seconds"}
    return value


@pytest.mark.slow
def test_two_models_all_tasks_one_table(student: Path, evaluate: Any, tmp_path: Path, glue_folder: Path) -> None:
    words = [student, f"again={student / 'hf'}", "--protocol", "mosaic", *FAST, "--seeds", 1, "RTE=2", "--out", "out"]
    said, _ = finish(evaluate(*words))
    out = tmp_path / "out"
    found = record(out)
    assert found["skipped"].keys() == {"QQP", "QNLI", "SST-2", "MRPC"}
    assert found["skipped"]["QNLI"] == "no QNLI/train.tsv"
    assert found["average_covers"] == ["MNLI", "CoLA", "STS-B", "RTE"]
    assert (out / "glue.md").read_text() in said
    names = list(found["models"])
    assert names[1] == "again"
    first, second = (found["models"][name] for name in names)
    assert without_seconds(first["tasks"]) == without_seconds(second["tasks"]), "the same model, other scores"
    assert first["pretraining"]["step"] == 8 and second["pretraining"] is None

    tasks = first["tasks"]
    assert list(tasks["MNLI"]["metrics"]) == ["accuracy", "accuracy-mm"]
    assert tasks["MNLI"]["score"] == statistics.fmean(row["mean"] for row in tasks["MNLI"]["metrics"].values())
    assert tasks["STS-B"]["score"] == tasks["STS-B"]["metrics"]["spearman"]["mean"], "mosaic scores Spearman alone"
    values = tasks["RTE"]["metrics"]["accuracy"]["values"]
    assert tasks["RTE"]["seeds"] == [19, 20]
    assert (tasks["RTE"]["score"], tasks["RTE"]["spread"]) == (statistics.fmean(values), statistics.stdev(values))
    assert first["average"] == statistics.fmean(tasks[name]["score"] for name in found["average_covers"])
    assert found["majority"]["tasks"]["RTE"]["accuracy"] == 0.5 and found["majority"]["tasks"]["CoLA"]["matthews"] == 0

    started = json.loads((out / names[0] / "RTE" / "20" / "run.json").read_text())["config"]["model"]
    assert started == str(out / names[0] / "MNLI" / "19" / "hf")
    started = json.loads((out / names[0] / "CoLA" / "19" / "run.json").read_text())["config"]["model"]
    assert started == str(student / "hf")
    for job in out.glob("*/*/*/run.json"):
        assert list(job.parent.glob("tensorboard/events*"))
        steps = [line["step"] for line in metrics(job.parent)]
        assert steps == sorted(set(steps)) and steps[-1] == json.loads(job.read_text())["result"]["step"]

    submitted = {file.name: file.read_text().splitlines() for file in (out / names[0] / "submission").iterdir()}
    assert submitted.keys() == {"CoLA.tsv", "STS-B.tsv", "RTE.tsv", "MNLI-m.tsv"}
    for lines in submitted.values():
        assert lines[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in lines[1:]] == list("01234")
    written = {name: {line.split("\t")[1] for line in lines[1:]} for name, lines in submitted.items()}
    assert written["CoLA.tsv"] <= {"0", "1"} and written["RTE.tsv"] <= {"entailment", "not_entailment"}
    assert written["MNLI-m.tsv"] <= {"entailment", "neutral", "contradiction"}
    assert all(0 <= float(text) <= 5 and len(text) == 5 for text in written["STS-B.tsv"])


def test_the_smoke_command_of_the_header_runs(student: Path, glue_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "glue").symlink_to(glue_folder)
    (tmp_path / "runs" / "bert_kd").mkdir(parents=True)
    (tmp_path / "runs" / "bert_kd" / "1").symlink_to(student)
    run(command(header(ROOT / "recipes" / "glue.py")["Smoke"]), 1, tmp_path)
    assert record(tmp_path / "runs" / "glue" / "1")["models"].keys() == {"runs-bert_kd-1"}


@pytest.mark.slow
def test_kill_9_half_way_then_the_same_call(student: Path, evaluate: Any, tmp_path: Path) -> None:
    words = [f"ours={student}", "--protocol", "sane", "--tasks", "CoLA", "WNLI", *FAST, "--epochs", 8, "--seeds", 2]
    finish(evaluate(*words, "--out", "whole"))
    out = tmp_path / "out"
    killed = evaluate(*words, "--out", "out")
    deadline = time.monotonic() + 300
    while not (before := finished(out)):
        assert killed.poll() is None and time.monotonic() < deadline, "no job has finished"
        time.sleep(0.02)
    for process in [*psutil.Process(killed.pid).children(recursive=True), killed]:
        process.kill()
    killed.communicate()
    assert len(before) < 4

    finish(evaluate(*words, "--out", "out"))
    assert len(finished(out)) == 4
    assert finished(out) | before == finished(out), "a finished job ran again"
    assert without_seconds(record(out)["models"]) == without_seconds(record(tmp_path / "whole")["models"])
    _, error = finish(evaluate(*words, "--out", "out", "--epochs", 2), code=2)
    assert "was begun with settings" in error
    finish(evaluate("--out", "out", "--resume"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_all_jobs_and_says_what_of_each_is_lost(
    number: int, student: Path, evaluate: Any, tmp_path: Path
) -> None:
    words = [f"ours={student}", "--protocol", "sane", "--tasks", "CoLA", "WNLI", *FAST, "--epochs", 5000]
    process = evaluate(*words, "--out", "out")
    deadline = time.monotonic() + 300
    while len(logs := [log for log in tmp_path.glob("out/*/*/*/metrics.jsonl") if log.stat().st_size]) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the jobs have not begun"
        time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, error = finish(process, 128 + number)
    assert not [one for one in started if one.is_running()]
    for log in logs:
        last = metrics(log.parent)[-1]["step"]
        name = log.parent.relative_to(tmp_path / "out")
        (lost,) = re.findall(rf"{name}: steps 1 to (\d+) of 15000 are lost; the same call begins this job anew", error)
        assert last <= int(lost) < 15000
    assert error.splitlines()[-1].endswith(
        "0 of 2 jobs have finished; the same call with --out {} continues".format(tmp_path / "out")
    )


def finished(out: Path) -> dict[Path, int]:
    """The jobs that have finished, and when."""
    files = [file for file in out.glob("*/*/*/run.json") if '"result"' in file.read_text()]
    return {file: file.stat().st_mtime_ns for file in files}


def test_losses_are_their_definitions() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    labels = torch.tensor([0.0, 1, 2, 1, 0])
    for ratio, tau in ((0.0, 1.0), (0.7, 2.0), (1.0, 1.0)):
        loss, label, kd = recipe.losses(
            job(kd_ratio=ratio, temperature=tau), glue.TASKS["MNLI"], student, labels, teacher if ratio else None
        )
        cross_entropy = F.cross_entropy(student, labels.long(), reduction="sum")
        log_q, log_p = (torch.log_softmax(logits / tau, 1) for logits in (student, teacher))
        kl = tau**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        assert label.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
        assert kd.item() == pytest.approx(kl.item() if ratio else 0.0, rel=1e-5)
        assert loss.item() == pytest.approx(((1 - ratio) * cross_entropy + ratio * kl).item(), rel=1e-5)
        (grad,) = torch.autograd.grad(loss, student)
        (truth,) = torch.autograd.grad((1 - ratio) * cross_entropy + ratio * kl, student)
        torch.testing.assert_close(grad, truth)
    scores, taught = torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [2.0]])
    sums = recipe.losses(job(kd_ratio=0.25), glue.TASKS["STS-B"], scores, torch.tensor([0.0, 5.0]), taught)
    assert sums.tolist() == [0.75 * 2 + 0.25 * 5, 2, 5]


def test_a_student_with_more_layers_than_its_config_is_refused(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"hf has 16 weights that .* does not take: bert.encoder.layer.1.attention"):
        models.build_student(job(model=str(tmp_path / "hf")), glue.TASKS["STS-B"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes batches whole")
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(
    student: Path, glue_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KD_CACHE", str(cache))
    task, one = glue.TASKS["STS-B"], job(model=str(student / "hf"), dropout=0.0, kd_ratio=0.5)
    train = glue.examples(glue.tokenise(task, str(glue_folder), load_tokenizer(one.model), 128))["train"]
    rows = torch.randperm(len(train))[:8]
    teacher_EV = torch.arange(len(train))[:, None].float()  # to each example an answer of its own
    whole, model = (models.build_student(one, task) for _ in range(2))
    logits_BV = models.forward(one, whole, train.batch(rows))
    recipe.losses(one, task, logits_BV, train.labels[rows], teacher_EV[rows])[0].backward()
    monkeypatch.setattr(recipe, "PIECE", 0)
    assert len(train.pieces(rows, 0)) > 1
    recipe.batch_losses(one, task, model, train, rows, teacher_EV)[0].backward()
    expected, got = ({name: weight.grad for name, weight in m.named_parameters()} for m in (whole, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_benchmark_starts(student: Path, glue_folder: Path, cache: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("KD_CACHE", str(cache))
    flags = ["--task", "WNLI", "--rounds", 1, "--steps", 1, "--epochs", 0]
    monkeypatch.setattr(sys, "argv", ["glue_step", *map(str, [student, glue_folder, *flags])])
    glue_step.main()
    assert "| WNLI | " in capsys.readouterr().out


def job(**fields: Any) -> FineTuning:
    settings = {"lr": 1e-3, "weight_decay": 0.0, "batch_size": 8, "epochs": 2, "max_length": 24}
    defaults: dict[str, Any] = dict.fromkeys(("out", "model", "weights", "task", "data", "tokenizer"), "")
    defaults |= {"seed": 1, "settings": settings, "schedule": "linear", "warmup_fraction": 0.1, "dropout": 0.1}
    defaults |= {
        "after": None,
        "teacher": None,
        "teacher_weights": "",
        "kd_ratio": 0.0,
        "temperature": 1.0,
        "precision": "auto",
        "compile": False,
    }
    return FineTuning(**defaults | {"keep_model": False} | fields)


@pytest.fixture
def run_job(
    student: Path, glue_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Runs a job in this process and returns its folder."""
    monkeypatch.setenv("KD_CACHE", str(cache))

    def run(name: str, task: str = "WNLI", **fields: Any) -> Path:
        source = str(student / "hf")
        data = glue.tokenise(glue.TASKS[task], str(glue_folder), load_tokenizer(source), 24)
        one = job(
            **{"out": str(tmp_path / name), "model": source, "task": task, "data": data, "tokenizer": source} | fields
        )
        assert recipe.fine_tune(one, contextlib.ExitStack()) == 0
        return tmp_path / name

    return run


def test_a_job_is_a_function_of_its_seed(run_job: Any) -> None:
    first, same, other = run_job("first"), run_job("same"), run_job("other", seed=2)
    losses = [[line["loss"] for line in metrics(folder)] for folder in (first, same, other)]
    assert losses[0] == losses[1] != losses[2]
    assert not (first / "hf").exists()


def test_long_jobs_alone_are_compiled(run_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    steps = json.loads((run_job("short", compile=True) / "run.json").read_text())["result"]["step"]
    assert compiled == []
    monkeypatch.setattr(recipe, "COMPILED_FROM", steps)
    run_job("long", compile=True)
    run_job("eager")
    assert compiled == [{"dynamic": True}]


@pytest.mark.parametrize("task", ["WNLI", "STS-B"])
def test_a_student_learns_what_its_teacher_says(run_job: Any, task: str) -> None:
    teacher = run_job("teacher", task, keep_model=True, seed=3)
    settings = {"lr": 2e-3, "weight_decay": 0.0, "batch_size": 8, "epochs": 12, "max_length": 24}
    kd = {"kd_ratio": 1.0, "teacher": str(teacher / "hf"), "dropout": 0.0, "settings": settings}
    student = run_job("taught", task, **kd)
    lines = metrics(student)
    assert all(line["loss"] == pytest.approx(line["kd_loss"]) for line in lines)
    assert lines[-1]["kd_loss"] < 0.2 * lines[0]["kd_loss"]
    alone, taught = (json.loads((folder / "run.json").read_text())["result"] for folder in (teacher, student))
    assert alone["teacher_s"] == 0 < taught["teacher_s"]
    assert taught["teacher"] == {name: value for name, value in alone.items() if name.startswith("eval/")}


@pytest.mark.slow
def test_the_table_says_what_teachers_know(run_job: Any, evaluate: Any, student: Path, tmp_path: Path) -> None:
    wrong, kept = tmp_path / "wrong", run_job("kept", "WNLI", keep_model=True, seed=3)
    shutil.copytree(kept / "hf", wrong)
    weights = load_file(wrong / "model.safetensors")
    save_file(weights | {"classifier.bias": torch.tensor([0.0, 1e3])}, wrong / "model.safetensors", {"format": "pt"})
    words = [f"s={student}", "--protocol", "sane", "--tasks", "WNLI", *FAST, "--kd-ratio", 0.5]
    said, progress = finish(evaluate(*words, "--teachers", f"WNLI={wrong}", "--out", "out"))
    assert (
        "The teacher of WNLI: accuracy 50.0, not above the majority class; its labels may be in another order" in said
    )
    assert ", its teacher accuracy 50.0, " in progress
    save_file(weights, wrong / "model.safetensors", {"format": "pt"})
    done = FineTuning(**json.loads((tmp_path / "out/s/WNLI/19/run.json").read_text())["config"])
    with pytest.raises(ValueError, match="wrong has changed since this evaluation began"):
        recipe.fine_tune(done, contextlib.ExitStack())
    with pytest.raises(ValueError, match="hf has changed since this evaluation began"):
        recipe.fine_tune(
            dataclasses.replace(done, teacher=None, teacher_weights="", weights="another"), contextlib.ExitStack()
        )
    glue_plan.require_unchanged(dataclasses.replace(done, teacher=None, teacher_weights="", weights="other", after={}))


def test_what_started_from_mnli_is_of_its_teacher(
    student: Path, glue_folder: Path, cache: Path, tmp_path: Path, run_job: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("KD_CACHE", str(cache))
    taught = {task: run_job(task, task, keep_model=True) for task in ("MNLI", "RTE")}
    other = run_job("other", "MNLI", keep_model=True, seed=2)

    def planned(mnli: Path) -> dict[str, FineTuning]:
        teachers = (f"MNLI={mnli}", f"RTE={taught['RTE']}")
        flags: Any = dict(tasks=("MNLI", "RTE"), teachers=teachers, kd_ratio=0.5, data=str(glue_folder), seeds=("1",))
        cfg = recipe.Config(models=(str(student),), out=str(tmp_path / "out"), **flags)
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as held:
            plan = glue_plan.make(cfg, Path(recipe.__file__), undo, held)
        return {one.input.task: one.input for one in plan.jobs}

    assert planned(taught["MNLI"])["RTE"] == planned(taught["MNLI"])["RTE"] != planned(other)["RTE"]


def test_teachers_that_will_not_do(run_job: Any, attempt: Callable[..., str], student: Path, tmp_path: Path) -> None:
    kept, bare = run_job("kept", "RTE", keep_model=True), tmp_path / "bare"
    shutil.copytree(kept / "hf", bare)
    config = json.loads((bare / "config.json").read_text())

    def said(teacher: Path, **changes: Any) -> str:
        (bare / "config.json").write_text(json.dumps(config | changes))
        return attempt(student, "--kd-ratio", 0.5, "--tasks", "WNLI", "--teachers", f"WNLI={teacher}")

    assert "was fine-tuned on RTE; give one of WNLI" in said(kept)
    assert "tells apart ['entailment', 'not_entailment'], the task ['0', '1']; rename id2label" in said(bare)
    assert "is not fine-tuned (['BertForMaskedLM'])" in said(student)
    assert "--max-length 128 is more than the 64 positions" in said(bare, max_position_embeddings=64)


def test_an_encoder_of_other_shapes_is_refused(run_job: Any, student: Path, tmp_path: Path) -> None:
    other = tmp_path / "wider"
    shutil.copytree(student / "hf", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 64}))
    with pytest.raises(ValueError, match=r"in other shapes: bert.embeddings.word_embeddings.weight"):
        run_job("out", model=str(other))


@pytest.mark.parametrize(
    "config", ["zero0_fp32_cpu.json", pytest.param("zero1_bf16.json", marks=pytest.mark.slow), "zero3_bf16.json"]
)
def test_checkpoints_of_any_stage_hold_the_run_s_weights(
    config: str, student: Path, corpus_file: Path, cache: Path, tmp_path: Path
) -> None:
    run = student
    if config != "zero0_fp32_cpu.json":
        run, flags = tmp_path / "run", ["--data", str(corpus_file), "--deepspeed-config", config]
        done = warm.ranks(2, [ROOT / "recipes" / "bert_kd.py", *SMALL, *flags, "--out", run], KD_CACHE=str(cache))
        assert done.returncode == 0, done.stderr[-3000:]
    truth = load_file(run / "hf" / "model.safetensors")
    state = checkpoints.read_checkpoint(run / "checkpoints" / "step00000008")
    assert checkpoints.read_state(run / "checkpoints" / "step00000008")["clocks"][0][0]["train"] > 0
    encoder = {name for name in truth if name.startswith("bert.")}
    assert encoder and encoder <= state.keys()
    for name in encoder:
        ours = state[name][: len(truth[name])]
        assert torch.equal(ours.to(truth[name].dtype), truth[name]), name
    (run / "checkpoints" / "step00000008" / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.read_checkpoint(run / "checkpoints" / "step00000008")
    shutil.move(tmp_path / "manifest.json", run / "checkpoints" / "step00000008")


def test_no_file_of_a_checkpoint_runs_code(student: Path, tmp_path: Path) -> None:
    """As an evaluation with --checkpoints all reads them: the whole command does nothing before that."""
    there = [file.name for file in (student / "checkpoints" / "step00000003").iterdir()]
    assert {"manifest.json"} < set(there)
    for name in there:
        run, mark = tmp_path / name / "run", tmp_path / name / "was_run"
        shutil.copytree(student, run)
        checkpoint = run / "checkpoints" / "step00000003"
        if name == "manifest.json":
            (checkpoint / name).write_bytes(pickle.dumps(Harmful(str(mark))))
        else:
            torch.save({"module": Harmful(str(mark))}, checkpoint / name)
            checkpoints._write_manifest(checkpoint)
        (model,) = glue_plan.named_models([f"x={run}"])
        with pytest.raises(ValueError, match=f"{checkpoint}.* is damaged"):
            glue_plan.checkpoints(model, ["all"], tmp_path / name / "out")
        assert not mark.exists()


@pytest.mark.slow
def test_checkpoints_give_quality_against_pretraining_seconds(
    student: Path, evaluate: Any, glue_folder: Path, cache: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "linked").symlink_to(student)
    words = [f"a={student}", f"b={tmp_path / 'linked'}", "--checkpoints", "all", "--tasks", "CoLA", *FAST]
    finish(evaluate(*words, "--protocol", "sane", "--out", "out"))
    out = tmp_path / "out"
    found = record(out)["models"]
    assert list(found) == ["a@3", "a@6", "a", "b@3", "b@6", "b"]
    seconds = [found[name]["pretraining"]["train_s"] for name in ("a@3", "a@6", "a")]
    assert seconds == sorted(seconds) and seconds[0] > 0
    before = metrics(student)
    for name in "ab":
        lines = metrics(out / "time_to_quality" / name)
        assert [line["step"] for line in lines] == [line["step"] for line in before]
        assert [{k: v for k, v in line.items() if k != "glue/average"} for line in lines] == before
        averages = {line["step"]: line["glue/average"] for line in lines if "glue/average" in line}
        assert averages == {
            3: found[f"{name}@3"]["average"],
            6: found[f"{name}@6"]["average"],
            8: found[name]["average"],
        }
    runs = [out / "time_to_quality" / name for name in "ab"]
    exported = out / "a@3" / "hf" / "model.safetensors"
    inode = exported.stat().st_ino
    monkeypatch.setenv("KD_CACHE", str(cache))
    monkeypatch.setattr(jobs, "SECONDS_TO_LEAVE", 0)
    with jobs.locked(out), pytest.raises(SystemExit):
        recipe.main([*map(str, words), "--protocol", "sane", "--data", str(glue_folder), "--out", str(out)])
    assert "is in use by another call" in capsys.readouterr().err
    assert exported.stat().st_ino == inode, "a model of the call that is going on was replaced"
    study = time_to_quality.report(runs[:1], runs[1:], metric="glue/average", out=tmp_path / "report")
    assert study["metric"] == "glue/average"
    run = read_record(runs[1])
    run["config"]["glue_flags"]["dropout"] = 0.2
    write_record(runs[1], run)
    with pytest.raises(ValueError, match="glue_flags"):
        time_to_quality.report(runs[:1], runs[1:], metric="glue/average", out=tmp_path / "report")


def test_what_counts_as_a_pretraining_run(
    run_job: Any, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run_job("kept", keep_model=True)
    (tmp_path / "linked").symlink_to(student)
    monkeypatch.chdir(tmp_path)
    run, tuned, alone = glue_plan.named_models(["linked", f"tuned={kept}", f"alone={student / 'hf'}"])
    assert (run.name, run.run, run.step, tuned.run, alone.run) == ("linked", str(student), 8, None, None)
    assert [model.name for model in glue_plan.checkpoints(run, ["3", "3"], tmp_path)] == ["linked@3"]
    monkeypatch.chdir(student)
    assert glue_plan.named_models(["."])[0].name == "-".join(student.parts[-3:])


@pytest.fixture
def attempt(
    glue_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs `main` in this process, expecting one line, exit code 2 and no folder."""
    monkeypatch.setenv("KD_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as end:
            recipe.main(["--data", str(glue_folder), "--protocol", "sane", "--out", "out", *map(str, words)])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert (end.value.code, len(lines)) == (2, 1), captured.err
        assert "Traceback" not in captured.err
        assert not (tmp_path / "out").exists(), "a half-made folder was left"
        return lines[0]

    return run


def test_bad_input(attempt: Callable[..., str], student: Path, glue_folder: Path, tmp_path: Path) -> None:
    assert "no model; give run folders" in attempt()
    assert "no model folder there" in attempt("./nowhere")
    assert "--tasks COLA: no task of GLUE; choose from CoLA" in attempt(student, "--tasks", "COLA")
    assert "the mosaic protocol does not have it" in attempt(student, "--protocol", "mosaic", "--tasks", "WNLI")
    assert "has none of the tasks: no QQP/train.tsv" in attempt(student, "--tasks", "QQP")
    assert "is no folder" in attempt(student, "--data", "./nowhere")
    assert "did you mean --epochs?" in attempt(student, "--epoch", 3)
    assert "two models are called" in attempt(student, student)
    assert "--kd-ratio must be above 0 with --teachers" in attempt(student, "--teachers", f"CoLA={student}")
    assert "--temperature must be a finite number above 0" in attempt(student, "--temperature", 0)
    kd = ("--kd-ratio", 0.5, "--tasks", "CoLA", "WNLI", "--teachers")
    assert "--teachers names none for WNLI" in attempt(student, *kd, f"CoLA={student}")
    assert "must be TASK=MODEL" in attempt(student, *kd, student)
    assert "is more than the 512 positions" in attempt(student, "--max-length", 600)
    assert "is no run folder" in attempt(student / "hf", "--checkpoints", "all")
    assert "--jobs must be at least 1, got 0" in attempt(student, "--jobs", 0)
    assert "did you mean --jobs?" in attempt(student, "--job", 3)
    assert "has 3, 6, 8 (--save-every, --keep)" in attempt(student, "--checkpoints", 5)
    assert "--resume" in attempt(student, "--resume")

    bare = tmp_path / "bare"
    shutil.copytree(student / "hf", bare, ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "special*"))
    assert f"{bare} comes without a tokenizer" in attempt(bare)
    other = tmp_path / "other"
    shutil.copytree(student / "hf", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    assert "is a model of type roberta" in attempt(other)
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    assert f"{other} cannot be loaded: Validation error for field 'hidden_size'" in attempt(other)
    run = tmp_path / "run"
    shutil.copytree(student / "hf", run / "hf")
    (run / "run.json").write_text("[]")
    assert "run/run.json is damaged" in attempt(run)

    data = tmp_path / "data"
    shutil.copytree(glue_folder, data)
    (data / "CoLA" / "dev.tsv").write_text("gj04\t2\t\tfine\n")
    assert "CoLA/dev.tsv, line 1: label '2' is none of CoLA's labels 0, 1" in attempt(student, "--data", data)
    (data / "RTE" / "train.tsv").write_text("index\tpremise\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    assert "has no column 'sentence1'" in attempt(student, "--data", data, "--tasks", "RTE")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes").touch()
    assert "is not an empty folder" in attempt(student, "--out", full)
    assert "holds a run that is no evaluation" in attempt(student, "--out", student)
