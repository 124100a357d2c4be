"""The planner's prediction against runs of the BERT recipe."""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from kd_core import plan
from tests.conftest import cpu_environment
from tests.recipes.conftest import RECIPE

# One thread, and its processor time in place of the clock's: so other work on the machine hardly counts.
PROCESSOR_TIME = """
import runpy, sys, time
time.perf_counter = time.process_time
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FLAGS = (
    "--student tiny --vocab-size 512 --seq-len 64 --mask-fraction 0.3 --global-batch-size 8 --micro-batch-size 8 "
    "--deepspeed-config zero0_fp32_cpu.json --log-every 10 --eval-every 1000 --save-every 1000"
).split()


@pytest.mark.slow
def test_the_prediction_is_within_a_tenth_of_the_measured_run(
    teacher: Path, corpus_file: Path, cache: Path, tmp_path: Path
) -> None:
    """Short runs give the rates, longer ones are predicted; all run at once, so that the machine treats them alike."""
    distil = ["--teachers", teacher, "--kd-ratio", 0.5]
    arms: dict[str, list[object]] = {
        "plain": ["--steps", 200],
        "kd": ["--steps", 200, *distil],
        "long": ["--steps", 320],
        "long_kd": ["--steps", 320, *distil, "--kd-stop", 0.5],
    }
    for round in range(3):
        running = []
        for arm, words in arms.items():
            command = [sys.executable, "-c", PROCESSOR_TIME, RECIPE, *FLAGS, "--data", corpus_file, *words]
            command += ["--out", tmp_path / arm / str(round)]
            env = cpu_environment(KD_CACHE=str(cache))
            running.append(subprocess.Popen(list(map(str, command)), env=env, stderr=subprocess.DEVNULL))
        assert [process.wait(timeout=600) for process in running] == [0] * len(arms)

    def seconds(arm: str) -> float:
        runs = [json.loads(file.read_text()) for file in (tmp_path / arm).glob("*/run.json")]
        assert len(runs) == 3
        return statistics.median(run["result"]["train_s"] for run in runs)

    measured = plan.measure([folder for arm in ("plain", "kd") for folder in (tmp_path / arm).iterdir()])
    planned = dataclasses.replace(plan.Plan(gpus=(1,)), **measured)
    planned = dataclasses.replace(planned, steps=320, kd_stop=0.5)
    plan.check(planned)
    row = plan.predict(planned, 1)
    print(f"predicted: {row['hours'] * 3600:.2f} s and with teacher {row['kd_hours'] * 3600:.2f} s")
    print(f"measured: {seconds('long'):.2f} s and with teacher {seconds('long_kd'):.2f} s")
    assert row["cost_ratio"] > 1.15, "the teacher is too cheap for this test to mean anything"
    assert row["hours"] * 3600 == pytest.approx(seconds("long"), rel=0.1)
    assert row["kd_hours"] * 3600 == pytest.approx(seconds("long_kd"), rel=0.1)
