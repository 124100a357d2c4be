"""A real small study through launch/study.sh: killed in the middle of a run, called again, then its report."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kd_core.runs import lean
from tests import warm
from tests.conftest import ROOT, cpu_environment
from tests.recipes.conftest import SMALL, metrics


@pytest.mark.slow
def test_two_arms_two_lengths_two_seeds(corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--global-batch-size 16 --micro-batch-size 16 --data", str(corpus_file)]
    study = {
        "recipe": "recipes/bert_kd.py",
        "flags": " ".join(flags).replace("--steps 8 ", ""),
        "teacher": "--student mini --steps 60",
        "arms": {"baseline": "", "kd": "--teachers {teacher} --kd-ratio 0.9 --kd-stop 0.5"},
        "baseline": "baseline",
        "lengths": [30, 60],
        "seeds": [1, 2],
    }
    (tmp_path / "study.json").write_text(json.dumps(study))
    out = tmp_path / "out"
    command = ["bash", str(ROOT / "launch" / "study.sh"), "study.json", "--out", "out"]
    env = cpu_environment(KD_CACHE=str(cache), PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    killed = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    victim = out / "kd" / "60" / "1"
    deadline = time.monotonic() + 300
    while not list(victim.glob("checkpoints/step*")):
        assert killed.poll() is None, "the study ended early"
        assert time.monotonic() < deadline, f"{victim} has no checkpoint within 5 minutes"
        time.sleep(0.02)
    children = psutil.Process(killed.pid).children()
    killed.kill()
    for child in children:  # at once, as in a power failure: the run has no time to save
        child.kill()
    killed.wait()
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/*/*/hf/model.safetensors")}
    assert before and not (victim / "hf").exists()

    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file: file.stat().st_mtime_ns for file in before} == before, "a finished run ran again"
    runs = sorted(file.parent for file in out.glob("*/*/*/run.json"))
    assert [str(run.relative_to(out)) for run in runs] == [
        f"{arm}/{steps}/{seed}" for arm in ("baseline", "kd") for steps in (30, 60) for seed in (1, 2)
    ]
    for run in runs:
        record = json.loads((run / "run.json").read_text())
        assert record["result"]["stopped"] == "finished"
        assert [line["step"] for line in metrics(run)] == list(range(1, record["config"]["steps"] + 1))
    assert ", from step " in (victim.parent / "1.log").read_text(), "the killed run began anew"
    report = json.loads((out / "report" / "kd" / "report.json").read_text())
    assert report["metric"] == "eval/loss"
    assert {target["method"] for target in report["targets"]} == {"tradeoff", "learning"}
    assert report["against"]["teacher_seconds"] > 0
    assert sum(file.suffix in (".png", ".svg") for file in (out / "report" / "kd").iterdir()) >= 4


@pytest.mark.slow
def test_a_chain_is_an_arm_that_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    study = {
        "recipe": str(ROOT / "tests" / "recipes" / "toys" / "stages.py"),
        "flags": "--save-every 100 --log-every 1000 --eval-every 2000",
        "arms": {"slow": "", "fast": "--lr 0.2"},
        "baseline": "slow",
        "lengths": [2000],
        "seeds": [1],
        "claim": {"arm": "fast", "against": "slow", "setting": "a line", "criterion": "below", "paper": "-"},
    }
    (tmp_path / "study.json").write_text(json.dumps(study))
    command = [sys.executable, "-m", "kd_core.study", "study.json", "--out", "out"]
    env = cpu_environment(PYTHONPATH=str(ROOT))
    with (tmp_path / "log").open("w") as log:
        killed = warm.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    first, second = (tmp_path / "out" / "slow" / "2000" / "1" / name for name in ("one", "two"))
    deadline = time.monotonic() + 240
    while not list(second.glob("checkpoints/step*")):
        assert time.monotonic() < deadline and killed.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    warm.kill([killed])
    before = (first / "run.json").stat().st_mtime_ns
    done = warm.run(command, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (first / "run.json").stat().st_mtime_ns == before, "a finished stage ran again"
    assert "from step" in second.with_suffix(".log").read_text().rpartition("--- resumed")[2]
    runs = lean.read(tmp_path / "out")
    assert list(runs) == ["slow/2000/1", "fast/2000/1"]
    for name, run in runs.items():
        spent = [json.loads((tmp_path / "out" / name / stage / "run.json").read_text()) for stage in ("one", "two")]
        assert run.end["train_s"] == pytest.approx(sum(one["result"]["train_s"] for one in spent), rel=1e-5)
