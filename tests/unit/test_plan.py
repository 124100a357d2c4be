"""The planner against sums done by hand, and what it reads from runs. Against measured runs: tests/recipes/test_plan.py."""

import dataclasses
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kd_core import plan
from kd_core.teachers import window
from kd_core.teachers.flags import DistillFlags

# One GPU's step of 64 samples: 300 ms for the student (forward 100), 100 for a teacher of the same size.
ALONE = plan.Plan(
    student_step_ms=300.0,
    teacher_forward_ms=(100.0,),
    measured_batch_size=64,
    global_batch_size=64,
    steps=1000,
    gpus=(1,),
)


@pytest.mark.parametrize(
    ("forward_ms", "stop", "ratio"),
    [(100, 1.0, 1.33), (100, 0.35, 1.12), (190, 0.5, 1.32), (350, 1.0, 2.17), (350, 0.2, 1.23), (0, 1.0, 1.0)],
)
def test_one_gpu_is_the_cost_model_of_the_paper(forward_ms: float, stop: float, ratio: float) -> None:
    row = plan.predict(dataclasses.replace(ALONE, teacher_forward_ms=(forward_ms,), kd_stop=stop), 1)
    assert row["cost_ratio"] == pytest.approx(1 + stop * (forward_ms / 100) / 3) == pytest.approx(ratio, abs=0.005)
    assert row["hours"] == pytest.approx(1000 * 0.3 / 3600)
    assert row["break_even_steps"] * row["kd_hours"] == pytest.approx(row["hours"])


def test_a_drawn_teacher_costs_one_forward_and_an_ensemble_all() -> None:
    pool = dataclasses.replace(ALONE, teacher_forward_ms=(90.0, 100.0, 170.0))
    assert plan.predict(pool, 1)["teacher_ms"] == pytest.approx(120)
    assert plan.predict(dataclasses.replace(pool, sampler="all"), 1)["teacher_ms"] == pytest.approx(360)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("steps", "start", "stop"), [(10, 0.0, 0.35), (7, 0.3, 0.5), (1000, 0.1, 0.7), (3, 0.5, 0.5)])
def test_the_window_is_the_schedules(steps: int, start: float, stop: float, every: int) -> None:
    cfg = DistillFlags(teachers=("a",), steps=steps, kd_ratio=1.0, kd_start=start, kd_stop=stop, kd_every=every)
    inside = sum(window.mix(cfg, step).kd_ratio for step in range(steps))
    assert plan.window_share(steps, start, stop, every) == pytest.approx(inside / steps)


def test_all_reduce_within_a_node_and_across() -> None:
    links = dataclasses.replace(ALONE, intra_node_gb_per_s=100, inter_node_gb_per_s=10, latency_us=10)
    assert plan.all_reduce_ms(1e9, 1, links) == 0
    assert plan.all_reduce_ms(1e9, 8, links) == pytest.approx(2 * 7 / 8 * 10 + 14 * 0.01)
    # 4 nodes: an eighth of the bytes over each GPU's own link.
    assert plan.all_reduce_ms(1e9, 32, links) == pytest.approx(17.5 + 2 * 3 / 4 * 100 / 8 + (14 + 6) * 0.01)


def test_more_gpus_share_the_samples_and_communicate() -> None:
    many = dataclasses.replace(
        ALONE, global_batch_size=4096, parameters=100e6, gpus=(8, 64), intra_node_gb_per_s=100, latency_us=0
    )
    eight, sixty_four = plan.predict(many, 8), plan.predict(many, 64)
    assert eight["student_ms"] == pytest.approx(300 * 4096 / 8 / 64)
    assert eight["communication_ms"] == pytest.approx(2 * 7 / 8 * 2)
    assert sixty_four["step_ms"] == pytest.approx(300 + 3.5 + 2 * 7 / 8 * 0.2e9 / 8 / 20e9 * 1000)
    assert sixty_four["teacher_ms"] == pytest.approx(100)
    assert sixty_four["cost_ratio"] < eight["cost_ratio"], (
        "communication, which teachers do not add to, dilutes their cost"
    )
    hidden = plan.predict(dataclasses.replace(many, overlap=0.75), 8)
    assert hidden["communication_ms"] == pytest.approx(eight["communication_ms"] / 4)


def test_measured_on_several_gpus_and_planned_for_them_is_the_measured_step() -> None:
    same = dataclasses.replace(ALONE, measured_gpus=16, gpus=(16,), parameters=1e9)
    assert plan.predict(same, 16)["step_ms"] == pytest.approx(300)
    assert plan.predict(same, 16)["teacher_ms"] == pytest.approx(100)
    with pytest.raises(
        ValueError, match=r"--student-step-ms 300\.0 is less than the communication expected on 16 GPUs"
    ):
        plan.predict(dataclasses.replace(same, parameters=1e12), 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"student_step_ms": 0.0},
            "--student-step-ms must be a finite number above 0; or name --measured runs, got 0.0",
        ),
        ({"teacher_forward_ms": (1.0, -1.0)}, "--teacher-forward-ms must be finite numbers, at least 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"kd_start": 0.5, "kd_stop": 0.4}, "--kd-stop must be in [--kd-start, 1] = [0.5, 1], got 0.4"),
        ({"gpus": (8,)}, "--parameters must be at least 1 for more than one GPU, got 0.0"),
        (
            {"gpus": (12,), "parameters": 1e6},
            "--gpus must be one or more numbers, each at least 1 and, above --gpus-per-node 8, a multiple of it, got",
        ),
        ({"measured_gpus": 12}, "--measured-gpus must be at least 1 and, above --gpus-per-node 8, a multiple of it"),
        ({"gpus_per_node": 0}, "--gpus-per-node must be at least 1, got 0"),
        ({"global_batch_size": -64}, "--global-batch-size must be at least 1, got -64"),
        ({"bytes_per_gradient": -2}, "--bytes-per-gradient must be at least 1, got -2"),
        ({"dollars_per_gpu_hour": -1.0}, "--dollars-per-gpu-hour must be a finite number, at least 0, got -1.0"),
        ({"student_step_ms": math.inf}, "--student-step-ms must be a finite number above 0"),
        ({"teacher_forward_ms": (1.0, math.nan)}, "--teacher-forward-ms must be finite numbers, at least 0"),
        ({"inter_node_gb_per_s": math.inf}, "--inter-node-gb-per-s must be a finite number above 0"),
        ({"parameters": math.inf}, "--parameters must be"),
        ({"latency_us": math.inf}, "--latency-us must be a finite number, at least 0"),
        ({"gpus": (128,), "parameters": 1e6}, "--global-batch-size 64 must be a multiple of --gpus 128"),
        ({"gpus": (0,)}, "--gpus must be one or more numbers, each at least 1 and"),
        ({"overlap": 1.5}, "--overlap must be in [0, 1], got 1.5"),
        ({"inter_node_gb_per_s": 0.0}, "--inter-node-gb-per-s must be a finite number above 0"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        plan.check(dataclasses.replace(ALONE, **fields))
    assert message in str(error.value)


def write_run(folder: Path, *, kd_ratio: float, teachers: int = 2, drawn: int = 1, **config: Any) -> Path:
    """A run of 100 steps whose window closes at 50: 10 ms a step, 4 a drawn teacher, a slow start and one stall."""
    folder.mkdir()
    defaults = dict(student="tiny", seq_len=32, micro_batch_size=8, global_batch_size=16, steps=100)
    window = dict(kd_ratio=kd_ratio, kd_start=0.0, kd_stop=0.5, sampler="uniform" if drawn == 1 else "all")
    names = [f"t{i}" for i in range(teachers)] if kd_ratio else []
    hardware = config.pop("hardware", {"name": "x"})
    run = {"config": defaults | window | {"teachers": names} | config, "world_size": 1, "hardware": hardware}
    (folder / "run.json").write_text(json.dumps(run))
    lines = []
    for step in range(10, 101, 10):
        teacher_s = 0.004 * drawn * min(step, 50) if kd_ratio else 0.0
        train_s = 3.0 + 0.010 * step + teacher_s + (7.0 if step >= 70 else 0.0)
        who = names[:drawn] if kd_ratio and step <= 50 else []
        lines.append(json.dumps({"step": step, "train_s": train_s, "teacher_s": teacher_s, "teacher": who}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("drawn", [1, 2])
def test_rates_and_flags_come_from_runs(drawn: int, tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", kd_ratio=0.0)
    kd = write_run(tmp_path / "kd", kd_ratio=0.9, drawn=drawn)
    fields = plan.measure([plain, kd])
    assert fields["student_step_ms"] == pytest.approx(10), "neither the start nor the stall counts"
    assert fields["teacher_forward_ms"] == pytest.approx((4, 4))
    row = plan.predict(dataclasses.replace(plan.Plan(gpus=(1,)), **fields), 1)
    assert row["kd_hours"] * 3600 == pytest.approx(0.010 * 100 + 0.004 * drawn * 50)
    assert plan.measure([plain])["teacher_forward_ms"] == ()


@pytest.mark.parametrize("log_every", [1, 5, 50])
def test_teachers_of_uneven_cost_count_by_their_mean(log_every: int, tmp_path: Path) -> None:
    kd = write_run(tmp_path / "kd", kd_ratio=0.9, kd_stop=1.0, steps=3000, teachers=3)
    draws, teacher_s, lines = random.Random(0), 0.0, []
    for step in range(1, 3001):
        drawn = draws.randrange(3)
        teacher_s += (0.010, 0.010, 0.200)[drawn]
        line = {"step": step, "train_s": 0.1 * step + teacher_s, "teacher_s": teacher_s, "teacher": [f"t{drawn}"]}
        lines.append(json.dumps(line))
    (kd / "metrics.jsonl").write_text("\n".join(lines[log_every - 1 :: log_every]) + "\n")
    fields = plan.measure([kd])
    assert fields["student_step_ms"] == pytest.approx(100)
    row = plan.predict(dataclasses.replace(plan.Plan(gpus=(1,)), **fields), 1)
    assert row["kd_hours"] * 3600 == pytest.approx(300 + teacher_s, rel=0.02)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({}, {"gradient_checkpointing": True}, "has gradient_checkpointing True"),
        ({}, {"vocab_size": 99}, "has vocab_size 99"),
        ({}, {"hardware": {"name": "y"}}, "has hardware {'name': 'y'}"),
        ({"kd_ratio": 0.9}, {"kd_ratio": 0.9, "teacher_dtype": "fp32"}, "has teacher_dtype fp32"),
        ({}, {"lr": 1, "seed": 3, "kd_ratio": 0.9, "temperature": 2, "teacher_dtype": "fp32", "steps": 100}, None),
    ],
)
def test_only_runs_of_one_kind_of_step_are_measured_together(
    one: dict[str, Any], other: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    runs = [write_run(tmp_path / name, **{"kd_ratio": 0.0} | own) for name, own in (("a", one), ("b", other))]
    if told is None:
        assert plan.measure(runs)["measured_gpus"] == 1
    else:
        with pytest.raises(ValueError, match=re.escape(told)):
            plan.measure(runs)


@pytest.mark.parametrize("record", ["{", "[]", '{"config": {}, "world_size": 1}', '{"config": null, "world_size": 1}'])
def test_a_damaged_run_is_named(record: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", kd_ratio=0)
    (run / "run.json").write_text(record)
    with pytest.raises(ValueError, match=r"a(/run\.json is damaged| is no run of this project, or damaged)"):
        plan.measure([run])


def test_runs_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    plain, other = write_run(tmp_path / "a", kd_ratio=0), write_run(tmp_path / "b", kd_ratio=0, student="mini")
    with pytest.raises(ValueError, match=r"b has student mini, .*a has tiny"):
        plan.measure([plain, other])
    with pytest.raises(FileNotFoundError, match="holds no run"):
        plan.measure([tmp_path / "nowhere"])
    lines = (plain / "metrics.jsonl").read_text().splitlines(keepends=True)
    (plain / "metrics.jsonl").write_text(lines[0])
    with pytest.raises(ValueError, match="fewer than two lines in its log"):
        plan.measure([plain])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kd, file = write_run(tmp_path / "kd", kd_ratio=0.9), tmp_path / "plan.json"
    words = f"--measured {kd} --global-batch-size 64 --parameters 1e6 --gpus 8 16 --steps 500 --json {file}"
    monkeypatch.setattr(sys, "argv", ["plan", *words.split(), "--dollars-per-gpu-hour", "2"])
    plan.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows] == ["GPUs", "8", "16*"], "4 samples are less than the measured micro-batch"
    written = json.loads(file.read_text())
    assert written["plan"]["steps"] == 500 and written["plan"]["kd_stop"] == 0.5
    assert [row["gpus"] for row in written["rows"]] == [8, 16]
