"""The BERT recipe end to end on the CPU: run folder, window, exact resume, clean stops, copies of it."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from kd_core.kernels.softmax_kl import softmax_kl
from kd_core.runs.folders import read_record, write_record
from kd_core.text import masking as text
from kd_core.text.bert import MaskedBert
from kd_core.text.corpus import IGNORE_INDEX, prepare
from kd_core.text.tokenizer import load_tokenizer, same_tokenizer
from tests import warm
from tests.conftest import ROOT, cpu_environment, deepspeed, free_port
from tests.recipes.conftest import RECIPE, SMALL, metrics, start, trace, wait_for_step

Train = Callable[..., subprocess.CompletedProcess[str]]


def test_logits_at_masked_positions_equal_the_full_computation() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    masked, full = MaskedBert(config).eval(), BertForMaskedLM(config).eval()
    full.load_state_dict(masked.state_dict())
    input_ids, positions = torch.randint(64, (3, 16)), torch.tensor([0, 5, 17, 47])
    with torch.no_grad():
        expected = full(input_ids).logits.flatten(0, 1)[positions]
        torch.testing.assert_close(masked(input_ids, positions), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def distilled(train: Train, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps on one process, the window open for the first 4, two teachers."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    train("--out", folder, "--teachers", teacher, teacher / "hf", "--kd-ratio", 0.9, "--kd-stop", 0.5)
    return folder


def test_run_folder_holds_what_other_programs_read(distilled: Path, teacher: Path) -> None:
    run = json.loads((distilled / "run.json").read_text())
    assert run["recipe"] == "bert_kd"
    assert run["config"]["kd_stop"] == 0.5
    assert run["config"]["teachers"] == [str(teacher), str(teacher / "hf")]
    assert set(run["hardware"]) == {"device", "name", "count"}
    assert run["world_size"] == 1
    assert {"argv", "versions", "commit"} <= set(run)
    assert run["result"]["stopped"] == "finished"
    assert [t["name"] for t in run["teachers"]] == [str(teacher), str(teacher / "hf")]
    assert run["teachers"][0]["eval/loss"] == pytest.approx(run["teachers"][1]["eval/loss"])
    lines = metrics(distilled)
    assert [line["step"] for line in lines] == list(range(1, 9))
    needed = "samples tokens loss label_loss kd_loss kd_ratio lr grad_norm teacher train_s teacher_s data_s".split()
    assert all(set(needed) <= set(line) for line in lines)
    assert [line["step"] for line in lines if "eval/loss" in line] == [4, 8]
    assert run["result"]["eval/loss"] == lines[-1]["eval/loss"]
    assert list((distilled / "tensorboard").glob("events*"))
    assert len(list((distilled / "checkpoints").glob("step*"))) == 2


def test_window_closes_and_the_teachers_go(distilled: Path) -> None:
    lines = metrics(distilled)
    inside, outside = lines[:4], lines[4:]
    assert all(line["kd_ratio"] == 0.9 and line["label_weight"] == pytest.approx(0.1) for line in inside)
    assert all(line["kd_loss"] > 0 and len(line["teacher"]) == 1 for line in inside)
    for line in inside:
        assert line["loss"] == pytest.approx(0.1 * line["label_loss"] + 0.9 * line["kd_loss"])
    assert all(line["kd_ratio"] == 0 and line["label_weight"] == 1 and line["teacher"] == [] for line in outside)
    assert all(line["loss"] == line["label_loss"] and line["kd_loss"] == 0 for line in outside)
    assert inside[-1]["teacher_s"] > 0
    assert {line["teacher_s"] for line in outside} == {inside[-1]["teacher_s"]}


def test_exported_student_has_the_same_validation_loss(distilled: Path, corpus_file: Path, cache: Path) -> None:
    os.environ["KD_CACHE"] = str(cache)
    corpus = prepare(str(corpus_file), tokenizer=None, vocab_size=512, seq_len=32)
    model = BertForMaskedLM.from_pretrained(distilled / "hf").eval()
    assert model.config.vocab_size == len(corpus.tokenizer)
    assert same_tokenizer(load_tokenizer(str(distilled / "hf")), corpus.tokenizer)
    loss_sum, tokens = 0.0, 0
    with torch.no_grad():
        for batch in text.validation_batches(corpus, micro_batch_size=16, rank=0, world_size=1):
            logits = model(batch.input_ids).logits.flatten(0, 1)[batch.positions]
            loss_sum += float(softmax_kl(logits, None, batch.labels)[1].double().sum())
            tokens += int((batch.labels != IGNORE_INDEX).sum())
    assert loss_sum / tokens == pytest.approx(metrics(distilled)[-1]["eval/loss"], rel=1e-5)


def test_export_crops_the_vocabulary_and_nothing_else(train: Train, tmp_path: Path) -> None:
    """1000 tokens are padded to 1024, which is also mini's feed-forward width."""
    train("--out", tmp_path / "run", "--student", "mini", "--vocab-size", 1000, "--steps", 2)
    model = BertForMaskedLM.from_pretrained(tmp_path / "run" / "hf")
    assert model.config.vocab_size == 1000
    assert model.cls.predictions.decoder.weight.shape == (1000, 256)
    assert model.cls.predictions.decoder.bias.shape == (1000,)
    assert model.bert.encoder.layer[0].intermediate.dense.weight.shape == (1024, 256)


def test_a_student_of_given_layers_and_width(train: Train, tmp_path: Path) -> None:
    train("--out", tmp_path / "run", "--student", "3x64", "--steps", 2)
    config = BertForMaskedLM.from_pretrained(tmp_path / "run" / "hf").config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 64, 1)
    assert config.intermediate_size == 256


def test_a_teacher_of_counts_and_a_baseline_s_own_settings(train: Train, tmp_path: Path) -> None:
    flags = "--teachers counts:unigram --kd-ratio 0.5 --decay-fraction 0.5 --adam-beta2 0.9 --initializer-range 0.04"
    train("--out", tmp_path / "run", *flags.split(), "--warmup-fraction", 0.25)
    lines = metrics(tmp_path / "run")
    assert [round(line["lr"], 6) for line in lines] == [5e-4, 1e-3, 1e-3, 1e-3, 7.55e-4, 5.1e-4, 2.65e-4, 2e-5]
    assert {tuple(line["teacher"]) for line in lines} == {("counts:unigram",)} and lines[0]["kd_loss"] > 0
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["teachers"][0]["eval/loss"] < math.log(512) and set(run["code"]) == {"kd_core", "recipe"}
    assert MaskedBert.from_pretrained(tmp_path / "run/hf").config.initializer_range == 0.04
    for words, told in (
        ("--teachers counts:trigram --kd-ratio 0.5", "counts:trigram is not known"),
        ("--teachers counts:unigram --kd-ratio 0.5 --teacher-placement host", "device for teachers that are no models"),
        ("--teachers counts:unigram --kd-ratio 0.5 --fused-head", "--fused-head must be off"),
        ("--adam-beta2 1", "--adam-beta2 must be in (0, 1)"),
        ("--decay-fraction 1.5", "--decay-fraction must be in [0, 1]"),
        ("--initializer-range 0", "--initializer-range must be above 0"),
    ):
        done = train("--out", tmp_path / "refused", *words.split(), check=False)
        assert done.returncode == 2 and told in done.stderr and not (tmp_path / "refused").exists(), done.stderr


def test_ratio_0_is_bit_identical_to_no_teacher(train: Train, teacher: Path, tmp_path: Path) -> None:
    train("--out", tmp_path / "without")
    train("--out", tmp_path / "ratio0", "--teachers", teacher, "--kd-ratio", 0)
    assert trace(tmp_path / "without") == trace(tmp_path / "ratio0")
    assert all(line["teacher_s"] == 0 for line in metrics(tmp_path / "ratio0"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_with_a_checkpoint_and_resume_is_exact(
    number: signal.Signals, code: int, corpus_file: Path, cache: Path, tmp_path: Path, train: Train
) -> None:
    flags = [*SMALL, "--data", corpus_file, "--steps", 400, "--save-every", 400, "--eval-every", 400]
    process = start(cache, sys.executable, RECIPE, *flags, "--out", tmp_path / "run")
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    process.send_signal(number)  # a second one changes nothing
    assert process.wait(timeout=120) == code
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    assert result["stopped"] == number.name
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step{result['step']:08d}"]
    assert not (tmp_path / "run" / "hf").exists()


def test_max_minutes_ends_the_same_way_and_a_damaged_checkpoint_is_passed_over(train: Train, tmp_path: Path) -> None:
    train("--out", tmp_path / "whole", "--steps", 10)
    train("--out", tmp_path / "run", "--steps", 10, "--max-minutes", 0.0001)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["result"]["stopped"] == "max-minutes"
    train("--out", tmp_path / "run", "--resume", "--steps", 10, "--max-minutes", 0.0001)
    assert len(list((tmp_path / "run" / "checkpoints").glob("step*"))) == 2
    newest = max((tmp_path / "run" / "checkpoints").glob("step*"))
    states = newest / "mp_rank_00_model_states.pt"
    damaged = bytearray(states.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    states.write_bytes(damaged)
    resumed = train("--out", tmp_path / "run", "--resume", "--steps", 10, "--max-minutes", 10)
    assert f"{newest} is damaged" in resumed.stderr
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def test_a_crash_or_a_full_disk_while_saving_leaves_the_last_good_checkpoint(train: Train, tmp_path: Path) -> None:
    train("--out", tmp_path / "whole")
    train("--out", tmp_path / "run", "--max-minutes", 0.0001)
    checkpoints = tmp_path / "run" / "checkpoints"
    good = next(checkpoints.glob("step*"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))  # of the run too; a write beyond it fails
    try:
        full = train("--out", tmp_path / "run", "--resume", "--max-minutes", 10, check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert len(errors) == 1 and "step00000003 cannot be written" in errors[0] and "--resume" in errors[0]
    assert list(checkpoints.glob("step*")) == [good]
    shutil.copytree(good, checkpoints / ".incomplete" / "step00000099")
    train("--out", tmp_path / "run", "--resume", "--max-minutes", 10)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    assert not (checkpoints / ".incomplete").exists()


def test_a_non_finite_step_stops_with_its_samples(train: Train, tmp_path: Path) -> None:
    done = train("--out", tmp_path / "run", "--lr", 1e30, "--warmup-fraction", 0, check=False)
    assert done.returncode == 1
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    assert result["stopped"] == "non-finite"
    assert len(result["sample_ids"]) == 8 and all(isinstance(number, int) for number in result["sample_ids"])
    assert "Traceback" not in done.stderr


def test_zero_3_in_bf16_on_two_ranks_runs_and_exports(corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    flags = ["--data", corpus_file, "--deepspeed-config", "zero3_bf16.json", "--out", tmp_path / "run"]
    done = warm.ranks(2, [RECIPE, *SMALL, *flags], KD_CACHE=str(cache))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = metrics(tmp_path / "run")
    assert lines[-1]["label_loss"] < lines[0]["label_loss"]
    assert BertForMaskedLM.from_pretrained(tmp_path / "run" / "hf").dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_offloading_on_a_cpu_changes_no_loss_and_resumes(stage: int, train: Train, tmp_path: Path) -> None:
    """With the recipe's own optimizer, and memory that cannot be pinned."""
    runs = {}
    for name, device in (("here", "none"), ("offloaded", "cpu")):
        config = tmp_path / f"{name}.json"
        zero = {"stage": stage, "offload_optimizer": {"device": device, "pin_memory": True}}
        config.write_text(json.dumps({"bf16": True, "fp16": None, "zero_optimization": zero}))
        runs[name] = tmp_path / name
        train("--out", runs[name], "--steps", 6, "--deepspeed-config", config)
    whole = trace(runs["offloaded"])
    assert [line[:2] for line in whole] == [line[:2] for line in trace(runs["here"])], "steps and losses"
    shutil.rmtree(runs["offloaded"] / "checkpoints" / "step00000006")
    record = read_record(runs["offloaded"])
    del record["result"]
    write_record(runs["offloaded"], record)
    assert (
        ", from step 3"
        in train("--out", runs["offloaded"], "--resume", "--steps", 6, "--deepspeed-config", config).stderr
    )
    assert trace(runs["offloaded"]) == whole


def test_bad_input_on_two_ranks_is_one_line(tmp_path: Path) -> None:
    flags = [*SMALL, "--data", str(tmp_path / "nowhere.txt"), "--out", str(tmp_path / "run")]
    done = deepspeed(2, str(RECIPE), *flags)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in done.stderr and "frame #" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_resume_refuses_other_data(train: Train, corpus_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    shutil.copy(corpus_file, data)
    train("--out", tmp_path / "run", "--data", data, "--max-minutes", 0.0001)
    text = data.read_text()
    data.write_text(text[: len(text) * 3 // 4])
    done = train("--out", tmp_path / "run", "--data", data, "--resume", check=False)
    assert done.returncode == 2
    assert "--data does not hold what the run began with" in done.stderr


def test_when_one_rank_dies_the_others_end(corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    two = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", 2, "--master_port", free_port()]
    flags = [*SMALL, "--data", corpus_file, "--steps", 4000, "--eval-every", 4000, "--save-every", 4000]
    process = start(cache, *two, RECIPE, *flags, "--out", tmp_path / "run")
    wait_for_step(tmp_path / "run", 2, process)
    found = subprocess.run(["pgrep", "-f", f"local_rank=1.*{tmp_path}"], capture_output=True, text=True)
    ranks = [int(pid) for pid in found.stdout.split()]
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    assert ranks
    assert process.wait(timeout=120) != 0


def test_a_copied_recipe_trains_with_the_project_uninstalled(corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copy(RECIPE, tmp_path)
    for folder in ("kd_core", "ds_configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    # An editable install is a path entry or an import hook: take both away.
    code = (
        f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]; sys.path.insert(0, '.');"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "import runpy; sys.argv = ['bert_kd.py', *sys.argv[1:]]; runpy.run_path('bert_kd.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *SMALL, "--data", str(corpus_file), "--steps", "4", "--out", "run"]
    env = cpu_environment(KD_CACHE=str(cache))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics(tmp_path / "run")) == 4


def test_the_authors_teacher_term_is_a_preset(train: Train, teacher: Path, tmp_path: Path) -> None:
    train("--preset", "as-released", "--teachers", teacher, "--kd-ratio", 0.9, "--steps", 2, "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    chosen = {name: config[name] for name in ("kd_ratio", "temperature", "divergence", "softmax_axis")}
    assert chosen == {"kd_ratio": 0.9, "temperature": 4.0, "divergence": "reverse_kl", "softmax_axis": "sequence"}
    assert all(line["kd_loss"] > 0 for line in metrics(tmp_path / "run"))
