"""Time to equal quality on run folders whose curves are known, the coverage of its intervals, and what it refuses."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_core.images.flags import ImageFlags
from kd_core.teachers.flags import DistillFlags
from kd_core.text.flags import MaskingFlags
from kd_core.time_to_quality import comparison
from kd_core.time_to_quality.comparison import main, report
from kd_core.time_to_quality.curves import (
    Run,
    block_means,
    falling_blocks,
    gradient,
    learning_curve,
    log_interval,
    quantile,
    tradeoff_curve,
)
from kd_core.training.flags import TrainFlags
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


def times(baseline: list[Path], against: list[Path], **asked: Any) -> dict[str, Any]:
    return comparison.compared(baseline, against, **asked)[0]


def rows(study: dict[str, Any], method: str) -> list[dict[str, Any]]:
    return [row for row in study["targets"] if row["method"] == method]


# --- known answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speed", "step_s", "speedup", "verdict"),
    [
        (2.0, 0.1, 2.0, "faster"),
        (2.0, 0.15, 4 / 3, "faster"),
        (1.0, 0.1, 1.0, "not decided"),
        (1.0, 0.2, 0.5, "slower"),
    ],
)
@pytest.mark.parametrize("metric", ["eval/loss", "eval/accuracy"])
def test_clean_curves_give_the_known_speedup(
    tmp_path: Path, speed: float, step_s: float, speedup: float, verdict: str, metric: str
) -> None:
    baseline = make_arm(tmp_path / "baseline", evaluations=40)
    against = make_arm(tmp_path / "kd", speed=speed, step_s=step_s, evaluations=40)
    study = times(baseline, against, metric=metric)
    for method in ("tradeoff", "learning"):
        assert len(rows(study, method)) == 5
        for row in rows(study, method):
            assert row["speedup"] == pytest.approx(speedup, rel=0.015)
            both = sorted(filter(None, (row["speedup"], row["straight"])))
            assert [row["low"], row["high"]] == pytest.approx([both[0], both[-1]]), "without noise, what they differ by"
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
    for row in times(*arms)["targets"]:
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


def test_the_quantile_is_two_sided() -> None:
    assert [quantile(df) for df in (1, 2, 30)] == pytest.approx([12.7062, 4.30265, 2.04227], rel=1e-5)


# --- curves -----------------------------------------------------------------------------------------------------------


def smoothed(values: list[float]) -> list[float]:
    quality = np.array(values)
    return list(block_means(quality, falling_blocks(quality)))


def test_smoothing_leaves_a_falling_curve_alone_and_averages_what_is_out_of_order() -> None:
    falling = [loss_at(step) for step in range(1, 50)]
    assert smoothed(falling) == falling
    assert smoothed([5, 3, 4, 2]) == [5, 3.5, 2]
    assert smoothed([4, 3, 3, 2, 2]) == [4, 3, 3, 2]
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


def plain_run(quality: list[float], *, steps: int = 0, seed: int = 1) -> Run:
    """A run evaluated at each second, a step a second."""
    at = np.arange(1.0, len(quality) + 1) * (steps / len(quality) if steps else 1)
    spent = np.stack([at, at, at, 0 * at, 0 * at, 0 * at], axis=1)
    return Run(Path("x"), {"steps": int(at[-1]), "seed": seed}, np.array(quality), spent, None)


def test_a_plateau_is_reached_when_it_begins_and_left_when_it_ends() -> None:
    curve = learning_curve([plain_run([3.0] * 9 + [2.0])])
    assert np.exp(curve.at(2.5).means[0]) == pytest.approx(9.5)
    assert np.exp(curve.at(3.0).means[0]) == pytest.approx(1)
    curve = learning_curve([plain_run([0.9, 0.8, 0.8, 0.8, 0.7])])
    assert [np.exp(curve.at(at).means[0]) for at in (0.85, 0.8, 0.75)] == pytest.approx([1.5, 2, 4.5])
    lengths = tradeoff_curve([plain_run([quality], steps=n) for n, quality in ((100, 3), (200, 2), (400, 2), (800, 1))])
    assert lengths is not None
    assert [np.exp(lengths.at(at).means[0]) for at in (3, 2, 1)] == pytest.approx([100, 200, 800])
    assert 400 < np.exp(lengths.at(1.999).means[0]) < 401
    assert tradeoff_curve([plain_run([2.0], steps=100), plain_run([2.0], steps=200)]) is None


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_interval_does_not_depend_on_the_unit_of_quality(scale: float) -> None:
    at = np.array([[3.0, 1.0], [2.0, 2.0]])
    unit = gradient(lambda points: float((points[:, 0] ** 2).sum() + points[0, 1]), at)
    scaled = gradient(lambda points: float(((points[:, 0] / scale) ** 2).sum() + points[0, 1]), at * [scale, 1])
    assert unit == pytest.approx(np.array([[6, 1], [4, 0]]), abs=1e-4)
    assert scaled * [scale, 1] == pytest.approx(unit, abs=1e-4)


def test_equal_arms_evaluated_at_other_steps_are_equal(tmp_path: Path) -> None:
    """Chords are later than a curve that bends: both arms must be late by the same."""

    def arm(name: str, steps: int, evaluations: int) -> list[Path]:
        return make_arm(tmp_path / name, lengths=(steps,), evaluations=evaluations)

    coarse = arm("coarse", 800, 8)
    study = times(coarse, arm("fine", 800, 80))
    assert {(row["speedup"], row["verdict"]) for row in study["targets"]} == {(1, "not decided")}
    assert any("only 8 evaluations are shared" in note for note in study["notes"])
    study = times(coarse, arm("short", 400, 40))  # at the same eighths of the run
    assert any("only 8 evaluations are shared" in note for note in study["notes"])
    study = times(coarse, arm("prime", 797, 797))
    assert any("Too few evaluations for a learning curve" in note for note in study["notes"])
    assert {row["verdict"] for row in study["targets"]} == {"out of reach"}


def test_a_target_between_lengths_far_apart_says_so_and_its_interval_holds_both_ways_to_get_there(
    tmp_path: Path,
) -> None:
    near = (100, 140, 190, 260, 350, 480)
    sparse, dense = make_arm(tmp_path / "sparse", lengths=(100, 480)), make_arm(tmp_path / "dense", lengths=near)
    study = times(sparse, dense, targets=[3.2, 3.5])
    for row in rows(study, "tradeoff"):
        assert row["gaps"] == {"baseline": [100, 480]}
        assert [row["low"], row["high"]] == pytest.approx(sorted((row["speedup"], row["straight"])))
        assert row["low"] < row["high"]
    (note,) = (note for note in study["notes"] if "lie there" in note)
    told = "No run of the baseline arm is longer than 100 and shorter than 480 steps: the targets 3.2, 3.5 lie there."
    assert note.startswith(told)
    again = times(dense, make_arm(tmp_path / "again", lengths=near), targets=[3.2, 3.5])
    assert not any("lie there" in note for note in again["notes"])


def test_what_was_observed_is_told_first_and_needs_every_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = make_arm(tmp_path / "a", seeds=(1, 2, 3))
    against = make_arm(tmp_path / "b", seeds=(1, 2, 3), speed=2.0)
    study = report(baseline, against)
    hardest = study["observed"][0]
    assert (hardest["baseline_steps"], hardest["against_steps"], hardest["seeds"]) == (800, 400, 3)
    assert hardest["speedup"] == pytest.approx(2)
    assert hardest["quality"] == pytest.approx(loss_at(800), abs=1e-4)
    assert capsys.readouterr().out.startswith(
        "Observed: distilled after 400 steps is as good as alone after 800 (eval/loss 2.707) in 3 of 3 seeds, 2 (2 to 2) times as fast."
    )
    assert [(pair["baseline_steps"], pair["against_steps"]) for pair in study["observed"]] == [(800, 400), (400, 200)]
    slow = times(baseline, make_arm(tmp_path / "c", seeds=(1, 2, 3), speed=0.5))
    assert "No distilled length is as good in every seed as alone after 800 steps, the longest." in slow["notes"]
    bad = make_run(tmp_path / "bad", seed=3, steps=400, speed=2.0, shift=0.01)
    study = report(baseline, [run for run in against if run.name != "3-400"] + [bad], out=tmp_path / "r")
    assert (study["observed"][0]["baseline_steps"], study["observed"][0]["against_steps"]) == (800, 800)


def test_a_head_start_is_a_saving_that_does_not_grow(tmp_path: Path) -> None:
    """Arms of which one has learnt for 100 steps before its first."""
    ahead = [
        make_run(tmp_path / f"b{steps}", steps=steps, shift=loss_at(steps + 100) - loss_at(steps))
        for steps in (100, 130, 170, 220, 290)
    ]
    study = times([make_run(tmp_path / f"a{steps}", steps=steps) for steps in (200, 230, 270, 320, 390)], ahead)
    for row in rows(study, "tradeoff"):
        assert row["saved"]["steps"] == pytest.approx(100, abs=1.5)
        assert row["saved"]["s"] == pytest.approx(10, abs=0.15)


def test_runs_of_an_arm_that_share_no_quality_reach_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = [
        [make_run(tmp_path / f"{name}{seed}", seed=seed, evaluations=1, shift=0.1 * seed) for seed in (1, 2)]
        for name in "ab"
    ]
    study = report(*arms)
    assert {row["verdict"] for row in study["targets"]} == {"out of reach"}
    assert study["baseline"]["reach"]["learning"] is None
    assert "In reach: baseline nothing, distilled nothing." in capsys.readouterr().out


def test_crossings_lie_between_evaluations(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps=200, evaluations=2) for name in ("a", "b")]
    target = (loss_at(100) + 3 * loss_at(200)) / 4
    (row,) = times(runs[:1], runs[1:], targets=[target])["targets"]
    assert row["baseline_s"] == pytest.approx(17.5)
    assert row["baseline"]["steps"] == pytest.approx(175)


def test_nothing_is_extrapolated_and_one_run_short_of_the_target_is_enough(tmp_path: Path) -> None:
    baseline = make_arm(tmp_path / "baseline", lengths=(400,))
    against = make_arm(tmp_path / "kd", lengths=(400,), speed=2)
    hard, easy = 2 + 20 / math.sqrt(600), 2 + 20 / math.sqrt(30)
    study = times(baseline, against, targets=[hard, easy, loss_at(200)])
    assert [row["verdict"] for row in study["targets"]] == ["out of reach", "out of reach", "faster"]
    first = study["targets"][0]
    assert first["baseline_s"] is None is first["speedup"]
    assert first["against_s"] == pytest.approx(30, rel=0.01)
    make_run(tmp_path / "kd" / "bad", seed=3, steps=400, shift=5)
    baseline.append(make_run(tmp_path / "baseline" / "good", seed=3, steps=400))
    study = times(baseline, [*against, tmp_path / "kd" / "bad"], targets=[loss_at(200)])
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
        assert (row["method"], row["low"], row["high"], row["verdict"]) == ("learning", None, None, "not decided")
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


def test_a_teacher_is_counted_once_and_never_as_free(tmp_path: Path) -> None:
    def cost(name: str, **config: Any) -> tuple[Any, str]:
        study = times([baseline], [make_run(tmp_path / name, speed=2, **config)])
        return study["against"]["teacher_seconds"], " ".join(study["notes"])

    baseline = make_run(tmp_path / "baseline")
    teacher = make_run(tmp_path / "T", student="mini", kd_ratio=0.5, teachers=["older"])
    seconds, notes = cost("twice", kd_ratio=0.9, teachers=[str(teacher), f"{teacher}/", f"{teacher}/hf"])
    assert seconds == 40
    assert "the training of its own teachers is not counted" in notes
    assert cost("unnamed", kd_ratio=0.9)[0] is None
    assert cost("none", kd_ratio=0.0, teachers=["T"])[0] == 0
    for number, damaged in enumerate(
        ('{"result": null}', "[]", '"x"', '{"result": {"train_s": null}}', '{"result": {"train_s": NaN}}', "{", "")
    ):
        (teacher / "run.json").write_text(damaged)
        seconds, notes = cost(str(number), kd_ratio=0.9, teachers=[str(teacher)])
        assert seconds is None and "its training cost is unknown" in notes, damaged


def test_nothing_is_paid_back_where_distillation_does_not_pay(tmp_path: Path) -> None:
    teacher = make_run(tmp_path / "T", student="mini")
    study = times(
        [make_run(tmp_path / "a")], [make_run(tmp_path / "b", speed=2, kd_ratio=0.9, teachers=[str(teacher)])]
    )
    assert all(row["speedup"] > 1 and row["verdict"] == "not decided" for row in study["targets"])
    assert {row["payback_runs"] for row in study["targets"]} == {None}


def test_the_terminal_says_where_the_arms_compute_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report([make_run(tmp_path / "a", compile=False)], [make_run(tmp_path / "b", compile=True)])
    assert "The arms differ in compile (False, True)" in capsys.readouterr().out


def test_runs_of_other_code_are_refused_and_older_ones_told_with_a_note(tmp_path: Path) -> None:
    def notes(**record: Any) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        arms = make_arm(folder / "a", record={"commit": "1" * 40}), make_arm(folder / "b", speed=2, record=record)
        return list(times(*arms)["notes"])

    assert "Runs of 2 commits are mixed, and were not checked to compute the same." in notes(commit="2" * 40)
    assert not [note for note in notes(commit="1" * 40) if "commits" in note]
    with pytest.raises(ValueError, match="made by code that differs in kd_core"):
        notes(commit="2" * 40, code={"kd_core": "a", "recipe": "b"})


@pytest.mark.parametrize(("count", "told"), [(1, True), (2, True), (3, False)])
def test_runs_on_fewer_cores_than_processes_and_their_loaders_say_so(tmp_path: Path, count: int, told: bool) -> None:
    record = {"world_size": 2, "hardware": {"device": "cpu", "name": "x", "count": count}}
    study = times(make_arm(tmp_path / "a", record=record), make_arm(tmp_path / "b", record=record, kd_ratio=0.5))
    assert sum("with a thread that makes batches" in note for note in study["notes"]) == told


def test_the_command_writes_the_whole_report(tmp_path: Path) -> None:
    baseline = make_arm(tmp_path / "baseline")
    against = make_arm(tmp_path / "kd", speed=2, kd_ratio=0.9)
    done = command(*baseline, "--against", *against, "--metric", "custom", "--higher-is-better", "--targets", 3)
    assert done.returncode == 0, done.stderr
    command(
        *baseline, "--against", *against, "--metric", "custom", "--lower-is-better", "--out", tmp_path / "new" / "r"
    )
    out = tmp_path / "new" / "r"
    names = {"report.json", "report.md"} | {
        f"{name}.{kind}" for name in ("quality", "speedup", "saved") for kind in ("png", "svg")
    }
    assert {path.name for path in out.iterdir()} == names
    study = json.loads((out / "report.json").read_text())
    assert study["metric"] == "custom"
    assert study["against"]["runs"] == [str(folder) for folder in against]
    fields = {"target", "method", "baseline_s", "against_s", "speedup", "low", "high", "verdict"}
    assert all(fields <= set(row) for row in study["targets"])
    assert "Distillation: faster at 5 of 5 targets (tradeoff curve)." in (out / "report.md").read_text()


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


def test_each_line_of_a_run_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a hundred runs of a thousand lines take seconds."""
    arms = [make_arm(tmp_path / name, log_every=2, speed=speed) for name, speed in (("baseline", 1.0), ("kd", 2.0))]
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    report(*arms)
    lines = [line for arm in arms for run in arm for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(parsed) == len(lines) + sum(map(len, arms))


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
        ({"result": {"train_s": None}}, "train_s or step not above 0"),
        ({"record": {"config": {"steps": 0}}}, "train_s or step not above 0"),
        ({"record": {"config": []}}, "b/run.json is damaged (its config is no dict)"),
        ({"record": {"config": None}}, "b/run.json is damaged (its config is no dict)"),
        ({"record": {"result": "x"}}, "b is no run of this project, or damaged"),
        ({"teachers": None}, "b is no run of this project, or damaged"),
        ({"seed": [1]}, "b is no run of this project, or damaged"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    baseline = [make_run(tmp_path / "a")]
    with pytest.raises(ValueError, match=re.escape(told)):
        times(baseline, [make_run(tmp_path / "b", speed=2, **settings)])
    assert not (tmp_path / "report").exists()


def test_arms_may_differ_in_method_and_optimizer_and_where_the_user_says_so(tmp_path: Path) -> None:
    baseline = [make_run(tmp_path / "a")]
    against = [make_run(tmp_path / "b", lr=2e-3, kd_ratio=0.5, sampler="all", beta=1)]
    study = times(baseline, against, may_differ=["beta"])
    assert set(study["differences"]) == {"lr", "kd_ratio", "sampler", "beta"}
    with pytest.raises(ValueError, match="runs of one arm must have the same lr"):
        times([*baseline, make_run(tmp_path / "c", seed=2, lr=1)], [make_run(tmp_path / "d")])
    with pytest.raises(ValueError, match="the same seed and length"):
        times([*baseline, make_run(tmp_path / "e")], [make_run(tmp_path / "f")])


def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    file = tmp_path / "file"
    file.write_text("not a run")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    (make_run(tmp_path / "bytes") / "metrics.jsonl").write_bytes(b"\xff\xfe")
    for words, told in (
        ((a, "--against", tmp_path), "holds no run (no run.json)"),
        ((a, "--against", tmp_path / "damaged"), "damaged"),
        ((a, b, "--against", tmp_path / "x" / ".." / "a"), "holds no run"),
        ((a, "--against", f"{a}/../a"), "given twice"),
        ((a, "--against", b, "--metric", "eval/f1"), "--lower-is-better or --higher-is-better"),
        ((a, "--against", b, "--metric", "eval/top1"), "has no eval/top1; --metric must be one of"),
        ((a, "--against", b, "--out", file), "is a file"),
        ((a, "--against", b, "--may-differ", "temprature"), "no run has such a field"),
        (
            (a, "--against", b, "--out", tmp_path / "new", "--targets", "nan"),
            "--targets must be finite numbers, got nan",
        ),
        ((a, "--against", b, "--targets", "3", "inf"), "--targets must be finite numbers, got 3.0 inf"),
        ((a, "--against", tmp_path / "bytes"), "bytes/metrics.jsonl is damaged (its last line is not that of step 400"),
        ((a, "--agianst", b), "the following arguments are required: --against (--help lists all flags)"),
    ):
        monkeypatch.setattr(sys, "argv", ["time_to_quality", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        line = capsys.readouterr().err
        assert (end.value.code, line.count("\n")) == (2, 1)
        assert line.startswith("error: ") and told in line, line
    assert not (tmp_path / "new").exists()


def test_every_flag_of_the_groups_is_of_some_kind() -> None:
    """A flag that is in none must be alike in all runs; then it is named here."""
    alike = {"data", "tokenizer", "vocab_size", "seq_len", "mask_fraction", "global_batch_size", "decoder"}
    alike |= {
        "train_size",
        "eval_resize",
        "eval_size",
        "crop",
        "min_scale",
        "randaugment",
        "decoded_gib",
        "max_corrupt",
        "held_out",
        "label_noise",
        "merge_classes",
    }
    fields = {
        field.name
        for group in (DistillFlags, TrainFlags, MaskingFlags, ImageFlags)
        for field in dataclasses.fields(group)
    }
    assert fields - comparison.OF_AN_ARM == alike
    assert not comparison.METHOD & (comparison.OPTIMIZER | comparison.COMPUTING | comparison.OF_A_RUN)
