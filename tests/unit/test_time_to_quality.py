"""Time to equal quality on run folders whose curves are known, the coverage of its intervals, and what it refuses."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_core.quality_curves import (
    Run,
    block_means,
    falling_blocks,
    learning_curve,
    log_interval,
    student_t,
    tradeoff_curve,
)
from kd_core.time_to_quality import main, report
from tests.conftest import ROOT, cpu_environment

LENGTHS = (200, 400, 800)


def loss_at(step: float) -> float:
    return 2 + 20 / math.sqrt(step)


def make_run(
    folder: Path,
    *,
    steps: int = 400,
    seed: int = 1,
    speed: float = 1.0,
    step_s: float = 0.1,
    shift: float = 0.0,
    evaluations: int = 10,
    log_every: int = 0,
    result: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A run that learns in a step what the law `loss_at` gives for `speed` steps, at `step_s` seconds a step."""
    settings = {"steps": steps, "seed": seed, "out": str(folder), "student": "tiny", "data": "texts", "seq_len": 64}
    settings |= {"global_batch_size": 8, "kd_ratio": 0.0, "teachers": [], "lr": 1e-3} | config
    lines = []
    for step in range(1, steps + 1):
        evaluated = step % (steps // evaluations) == 0
        if not evaluated and not (log_every and step % log_every == 0):
            continue
        inside = settings["kd_ratio"] * (step <= steps / 2)
        line = {"step": step, "samples": 8 * step, "loss": 1.0, "kd_ratio": inside, "train_s": step * step_s}
        line |= {"teacher_s": step * step_s / 4 if settings["kd_ratio"] else 0.0, "data_s": step * step_s / 10}
        if evaluated:
            loss = loss_at(step * speed) + shift
            line |= {"eval/loss": loss, "eval/accuracy": 1 - loss / 20, "custom": loss}
        lines.append(line)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = {"config": settings, "hardware": {"device": "cpu", "name": "x", "count": 2}, "world_size": 1}
    whole |= {"result": {**lines[-1], "stopped": "finished"} | (result or {})} | (record or {})
    (folder / "run.json").write_text(json.dumps(whole))
    return folder


def make_arm(
    parent: Path, seeds: tuple[int, ...] = (1, 2), lengths: tuple[int, ...] = LENGTHS, **settings: Any
) -> list[Path]:
    return [
        make_run(parent / f"{seed}-{steps}", seed=seed, steps=steps, **settings) for seed in seeds for steps in lengths
    ]


def rows(study: dict[str, Any], method: str) -> list[dict[str, Any]]:
    return [row for row in study["targets"] if row["method"] == method]


# --- known answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speed", "step_s", "speedup", "verdict"),
    [
        (2.0, 0.1, 2.0, "pays"),
        (2.0, 0.15, 4 / 3, "pays"),
        (1.0, 0.1, 1.0, "undecided"),
        (1.0, 0.2, 0.5, "does not pay"),
    ],
)
@pytest.mark.parametrize("metric", ["eval/loss", "eval/accuracy"])
def test_clean_curves_give_the_known_speedup(
    tmp_path: Path, speed: float, step_s: float, speedup: float, verdict: str, metric: str
) -> None:
    baseline = make_arm(tmp_path / "baseline", evaluations=40)
    against = make_arm(tmp_path / "kd", speed=speed, step_s=step_s, evaluations=40)
    study = report(baseline, against, metric=metric)
    for method in ("tradeoff", "learning"):
        assert len(rows(study, method)) == 5
        for row in rows(study, method):
            assert row["speedup"] == pytest.approx(speedup, rel=0.015)
            assert row["low"] == pytest.approx(row["speedup"]) == row["high"]
            assert row["verdict"] == verdict
    for row in study["targets"]:
        loss = row["target"] if metric == "eval/loss" else 20 * (1 - row["target"])
        steps = (20 / (loss - 2)) ** 2
        assert row["baseline"]["steps"] == pytest.approx(steps, rel=0.01)
        assert row["baseline"]["samples"] == pytest.approx(8 * steps, rel=0.01)
        assert row["baseline_s"] == pytest.approx(0.1 * steps, rel=0.01)


def test_noise_between_seeds_gives_an_interval_that_holds_the_truth(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, (3, 3))
    arms = [
        [
            make_run(
                tmp_path / f"{name}{seed}-{steps}", seed=seed, steps=steps, shift=noise[seed, i] * sign, speed=speed
            )
            for seed in range(3)
            for i, steps in enumerate(LENGTHS)
        ]
        for name, speed, sign in (("baseline", 1.0, 1), ("kd", 1.5, -1))
    ]
    for row in report(*arms)["targets"]:
        assert row["low"] < 1.5 < row["high"] < 1.5 * row["speedup"] / row["low"] * 1.2
        assert row["low"] < row["speedup"] < row["high"]


def simulated(rng: np.random.Generator, seeds: list[int], speed: float, offsets: dict[int, float]) -> list[Run]:
    """Runs of three lengths; a seed's runs share half of their noise in quality, and seconds are noisy besides."""
    runs = []
    for seed in seeds:
        for steps in LENGTHS:
            at = np.linspace(steps / 20, steps, 20)
            quality = 2 + 20 / np.sqrt(at * speed) + 0.03 * (offsets[seed] + rng.normal()) + 0.01 * rng.normal(size=20)
            seconds = 0.1 * at * np.exp(0.03 * rng.normal())
            spent = np.stack([seconds, at, 8 * at, seconds / 4, seconds / 10, 0 * at], axis=1)
            runs.append(Run(Path(f"{seed}-{steps}"), {"steps": steps, "seed": seed}, quality, spent, None))
    return runs


@pytest.mark.parametrize(
    ("method", "paired", "num_seeds"),
    [
        ("tradeoff", True, 2),
        ("tradeoff", False, 3),
        ("tradeoff", True, 5),
        ("learning", True, 3),
        ("learning", False, 3),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(method: str, paired: bool, num_seeds: int) -> None:
    rng, held = np.random.default_rng(num_seeds), []
    target, speed = 2 + 20 / math.sqrt(480), 1.4
    for _ in range(1000):
        offsets = dict(enumerate(rng.normal(size=10)))
        seeds = list(range(num_seeds))
        arms = [
            simulated(rng, seeds, 1.0, offsets),
            simulated(rng, seeds if paired else [5 + seed for seed in seeds], speed, offsets),
        ]
        if method == "learning":
            curves = [learning_curve([run for run in arm if run.length == LENGTHS[-1]]) for arm in arms]
        else:
            curves = [curve for curve in map(tradeoff_curve, arms) if curve]
        interval = log_interval(*(curve.at(target) for curve in curves))
        assert interval is not None
        held.append(interval[0] <= math.log(speed) <= interval[1])
    assert 0.925 <= np.mean(held) <= 0.985, np.mean(held)


@pytest.mark.parametrize(("df", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227)])
def test_student_t_is_that_of_the_tables(df: float, quantile: float) -> None:
    assert student_t(df) == pytest.approx(quantile, rel=1e-4)


# --- curves -----------------------------------------------------------------------------------------------------------


def smoothed(values: list[float]) -> list[float]:
    quality = np.array(values)
    return list(block_means(quality, falling_blocks(quality)))


def test_smoothing_leaves_a_falling_curve_alone_and_averages_what_is_out_of_order() -> None:
    falling = [loss_at(step) for step in range(1, 50)]
    assert smoothed(falling) == falling
    assert smoothed([5, 3, 4, 2]) == [5, 3.5, 2]
    assert smoothed([3, 3, 3]) == [3]
    assert smoothed([5, 4, 3, 6, 7]) == [5, 4, 3]  # overfitting later does not undo what was reached


def test_smoothing_does_not_shift_a_noisy_curve() -> None:
    rng, at = np.random.default_rng(0), np.arange(1.0, 401.0)
    spent = np.stack([at, at, at, 0 * at, 0 * at, 0 * at], axis=1)
    crossed = [
        learning_curve([Run(Path("x"), {"steps": 400}, 6 - at / 100 + 0.2 * rng.normal(size=400), spent, None)])
        .at(4.0)
        .means[0]
        for _ in range(200)
    ]
    assert np.exp(np.mean(crossed)) == pytest.approx(200, rel=0.02)  # the first raw crossing lies 15 % earlier


def test_crossings_lie_between_evaluations(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps=200, evaluations=2) for name in ("a", "b")]
    target = (loss_at(100) + 3 * loss_at(200)) / 4
    (row,) = report(runs[:1], runs[1:], targets=[target])["targets"]
    assert row["baseline_s"] == pytest.approx(17.5)
    assert row["baseline"]["steps"] == pytest.approx(175)


def test_nothing_is_extrapolated_and_one_run_short_of_the_target_is_enough(tmp_path: Path) -> None:
    baseline = make_arm(tmp_path / "baseline", lengths=(400,))
    against = make_arm(tmp_path / "kd", lengths=(400,), speed=2)
    hard, easy = 2 + 20 / math.sqrt(600), 2 + 20 / math.sqrt(30)
    study = report(baseline, against, targets=[hard, easy, loss_at(200)])
    assert [row["verdict"] for row in study["targets"]] == ["out of reach", "out of reach", "pays"]
    first = study["targets"][0]
    assert first["baseline_s"] is None is first["speedup"]
    assert first["against_s"] == pytest.approx(30, rel=0.01)
    make_run(tmp_path / "kd" / "bad", seed=3, steps=400, shift=5)
    baseline.append(make_run(tmp_path / "baseline" / "good", seed=3, steps=400))
    study = report(baseline, [*against, tmp_path / "kd" / "bad"], targets=[loss_at(200)])
    assert study["targets"][0]["verdict"] == "out of reach"


def test_arms_that_share_no_quality_are_reported_as_such(tmp_path: Path) -> None:
    baseline = make_arm(tmp_path / "baseline", shift=10.0)
    study = report(baseline, make_arm(tmp_path / "kd"))
    assert {row["verdict"] for row in study["targets"]} == {"out of reach"}
    assert (tmp_path / "report" / "quality.png").exists()


def test_a_single_run_an_arm_gives_numbers_without_an_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = report([make_run(tmp_path / "a")], [make_run(tmp_path / "b", speed=2)])
    for row in study["targets"]:
        assert row["speedup"] == pytest.approx(2, rel=0.1)
        assert (row["method"], row["low"], row["high"], row["verdict"]) == ("learning", None, None, "undecided")
    assert "without an interval" in capsys.readouterr().out


# --- teachers and files -----------------------------------------------------------------------------------------------


def test_the_teachers_cost_is_its_own_run_and_is_paid_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("teacher"), student="mini", steps=1000)
    baseline = make_arm(Path("baseline"), teachers=["nobody/knows"])  # named, but kd_ratio is 0
    against = make_arm(Path("kd"), speed=2, kd_ratio=0.9, kd_stop=0.5, teachers=["teacher"])
    study = report(baseline, against)
    assert (study["baseline"]["teacher_seconds"], study["against"]["teacher_seconds"]) == (0, 100)
    for row in study["targets"]:
        assert row["payback_runs"] == pytest.approx(100 / (row["baseline_s"] - row["against_s"]), rel=1e-3)
        parts = row["against"]["seconds"]
        assert sum(parts.values()) == pytest.approx(row["against_s"], rel=1e-3)
        assert parts["teacher"] == pytest.approx(row["against_s"] / 4, rel=1e-3)
        assert parts["data"] == pytest.approx(row["against_s"] / 10, rel=1e-3)
    Path("answers").mkdir()
    Path("answers/header.json").write_text('{"teacher": "teacher"}')
    Path("answers/build.json").write_text('{"seconds": 7}')
    cached = report(baseline, make_arm(Path("cached"), speed=2, kd_ratio=0.9, teachers=["cache:answers"]))
    assert cached["against"]["teacher_seconds"] == 107
    unknown = make_arm(Path("hub"), speed=2, kd_ratio=0.9, kd_stop=0.5, teachers=["teacher", "google-bert/bert-base"])
    study = report(baseline, unknown)
    assert study["against"]["teacher_seconds"] is None
    assert {row["payback_runs"] for row in study["targets"]} == {None}
    assert "training cost is unknown" in capsys.readouterr().out


def test_the_command_writes_the_whole_report(tmp_path: Path) -> None:
    baseline = make_arm(tmp_path / "baseline")
    against = make_arm(tmp_path / "kd", speed=2, kd_ratio=0.9)
    done = command(*baseline, "--against", *against, "--metric", "custom", "--higher-is-better", "--targets", 3)
    assert done.returncode == 0, done.stderr
    command(
        *baseline, "--against", *against, "--metric", "custom", "--lower-is-better", "--out", tmp_path / "new" / "r"
    )
    out = tmp_path / "new" / "r"
    names = {"report.json", "report.md", "quality.png", "quality.svg", "speedup.png", "speedup.svg"}
    assert {path.name for path in out.iterdir()} == names
    study = json.loads((out / "report.json").read_text())
    assert study["metric"] == "custom"
    assert study["against"]["runs"] == [str(folder) for folder in against]
    fields = {"target", "method", "baseline_s", "against_s", "speedup", "low", "high", "verdict"}
    assert all(fields <= set(row) for row in study["targets"])
    assert "Distillation: pays at 5 of 5 targets (tradeoff curve)." in (out / "report.md").read_text()


def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "kd_core.time_to_quality", *map(str, words)]
    return subprocess.run(line, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=120)


def test_length_and_quality_may_stand_in_the_log_alone(tmp_path: Path) -> None:
    arms = [make_arm(tmp_path / name, speed=speed) for name, speed in (("baseline", 1.0), ("kd", 2.0))]
    whole = report(*arms, out=tmp_path / "whole")
    for folder in (*arms[0], *arms[1]):
        record = json.loads((folder / "run.json").read_text())
        del record["config"]["steps"]
        (folder / "run.json").write_text(json.dumps(record | {"result": {"stopped": "finished"}}))
    assert report(*arms, out=tmp_path / "log") == whole


def test_a_hundred_runs_of_a_thousand_lines_take_under_five_seconds(tmp_path: Path) -> None:
    lengths = (1000, 2000)
    arms = [
        make_arm(tmp_path / name, seeds=tuple(range(25)), lengths=lengths, evaluations=100, log_every=2, speed=speed)
        for name, speed in (("baseline", 1.0), ("kd", 2.0))
    ]
    began = time.process_time()
    assert len(report(*arms)["targets"]) == 10
    assert time.process_time() - began < 5


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"data": "other"}, "the same data"),
        ({"seq_len": 32}, "the same seq_len"),
        ({"student": "mini"}, "the same student"),
        ({"global_batch_size": 16}, "the same global_batch_size"),
        ({"masked": "only here"}, "the same masked"),
        ({"record": {"hardware": {"device": "cuda"}}}, "the same hardware"),
        ({"record": {"world_size": 2}}, "the same world_size"),
        ({"record": {"result": {}}}, "has not finished"),
        ({"result": {"stopped": "max-minutes"}}, "has not finished"),
        ({"result": {"eval/loss": math.nan}}, "is no number"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    baseline = [make_run(tmp_path / "a")]
    with pytest.raises(ValueError, match=told):
        report(baseline, [make_run(tmp_path / "b", speed=2, **settings)])
    assert not (tmp_path / "report").exists()


def test_arms_may_differ_in_method_and_optimizer_and_where_the_user_says_so(tmp_path: Path) -> None:
    baseline = [make_run(tmp_path / "a")]
    against = [make_run(tmp_path / "b", lr=2e-3, kd_ratio=0.5, sampler="all", beta=1)]
    study = report(baseline, against, may_differ=["beta"])
    assert set(study["differences"]) == {"lr", "kd_ratio", "sampler", "beta"}
    with pytest.raises(ValueError, match="runs of one arm must have the same lr"):
        report([*baseline, make_run(tmp_path / "c", seed=2, lr=1)], [make_run(tmp_path / "d")])
    with pytest.raises(ValueError, match="the same seed and length"):
        report([*baseline, make_run(tmp_path / "e")], [make_run(tmp_path / "f")])


def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    file = tmp_path / "file"
    file.write_text("not a run")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    for words, told in (
        ((a, "--against", tmp_path), "holds no run (no run.json)"),
        ((a, "--against", tmp_path / "damaged"), "damaged"),
        ((a, b, "--against", tmp_path / "x" / ".." / "a"), "holds no run"),
        ((a, "--against", f"{a}/../a"), "given twice"),
        ((a, "--against", b, "--metric", "eval/f1"), "--lower-is-better or --higher-is-better"),
        ((a, "--against", b, "--metric", "eval/top1"), "has no eval/top1; --metric must be one of"),
        ((a, "--against", b, "--out", file), "is a file"),
        ((a, "--against", b, "--may-differ", "temprature"), "no run has such a field"),
    ):
        monkeypatch.setattr(sys, "argv", ["time_to_quality", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        line = capsys.readouterr().err
        assert (end.value.code, line.count("\n")) == (2, 1)
        assert line.startswith("error: ") and told in line, line
