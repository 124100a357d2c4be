"""What is said of a study's arms at equal steps, on runs whose numbers are known."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from kd_core import compare
from kd_core.runs import lean
from kd_core.runs.design import Study, interleaved

CLAIM = {"arm": "new", "against": "kd", "setting": "numbers", "criterion": "above zero", "paper": "+0.5"}
LABELS, KD = [0.50, 0.52, 0.51, 0.49, 0.50], [0.53, 0.56, 0.55, 0.52, 0.54]
DESIGN: dict[str, Any] = dict(
    recipe="recipes/resnet_kd.py", baseline="labels", lengths=[10], seeds=[1, 2, 3, 4, 5], metric="eval/accuracy",
    arms={"labels": "", "kd": "", "new": {"recipe": "recipes/logits/dkd.py"}}, claim=CLAIM,
)  # fmt: skip


def runs(teacher: float | None = 0.7, **arms: list[float]) -> dict[str, lean.Lean]:
    """By arm the accuracies of seeds 1, 2, ...; a run of `new` takes twice as long as one of `labels`."""
    made = {"teacher": lean.Lean({"config": {}, "result": {}}, [{"step": 5, "train_s": 100.0}])}
    for arm, values in arms.items():
        for seed, value in enumerate(values, 1):
            asked = [] if teacher is None or arm == "labels" else [{"name": "t", "eval/accuracy": teacher}]
            record = {
                "config": {},
                "teachers": asked,
                "result": {"stopped": "finished", "peak_memory_gib": 1 + seed / 10},
            }
            end = {"step": 10, "train_s": seed * (2.0 if arm == "new" else 1.0)}
            made[f"{arm}/10/{seed}"] = lean.Lean(record, [end | {"eval/accuracy": value, "eval/ece": 1 - value}])
    return made


def at(new: list[float], **entries: Any) -> compare.Compared:
    return compare.compare(Study(**DESIGN | entries), runs(labels=LABELS, kd=KD, new=new), 10)


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    new = [0.54, 0.55, 0.57, 0.53, 0.55]
    difference = at(new).difference("new", "kd")
    test = scipy.stats.ttest_rel(100 * np.array(new), 100 * np.array(KD)).confidence_interval()
    assert (difference.low, difference.high) == pytest.approx((test.low, test.high))
    assert difference.half == pytest.approx((test.high - test.low) / 2)


def test_only_seeds_of_both_are_compared_and_one_seed_has_no_interval() -> None:
    assert at([0.54, 0.57]).difference("new", "kd").mean == pytest.approx(1.0)
    one = at([0.54]).difference("new", "kd")
    assert one.count == 1 and math.isnan(one.low) and one.told(2) == "+1.00"
    assert at([0.54]).verdict == "not shown"


def test_the_cost_is_a_ratio_in_the_same_seeds() -> None:
    cost = at(KD).cost("new", "labels")
    assert (cost.mean, cost.low, cost.high) == pytest.approx((2, 2, 2))
    assert at(KD).memory["new"] == 1.5 and at(KD).prepared == {"teacher": 100}


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ([0.01, 0.011, 0.009, 0.01, 0.012], "holds here"),
        ([0.01, -0.011, 0.009, -0.01, 0.012], "not shown"),
        ([-0.01, -0.011, -0.009, -0.01, -0.012], "contradicted"),
    ],
)
def test_the_verdict_is_the_side_of_the_interval(change: list[float], verdict: str) -> None:
    new = [value + step for value, step in zip(KD, change, strict=True)]
    assert at(new).verdict == verdict
    lower = at(new, metric="eval/ece")  # 1 - accuracy, lower is better
    assert lower.verdict == verdict and lower.difference("new", "kd").mean == pytest.approx(-np.mean(change))


def test_a_setting_in_which_nothing_can_be_seen_does_not_count() -> None:
    study = Study(**DESIGN)
    better = [value + 0.1 for value in KD]
    useless = compare.compare(study, runs(labels=LABELS, kd=LABELS, new=better), 10)
    assert useless.verdict == "does not count: `kd` is not better than `labels`"
    bad = compare.compare(study, runs(teacher=0.5, labels=LABELS, kd=KD, new=better), 10)
    assert bad.verdict == "does not count: no teacher is better than `labels`"
    assert compare.compare(study, runs(teacher=None, labels=LABELS, kd=KD, new=better), 10).verdict == "holds here"


def test_the_row_says_it_all() -> None:
    row = dict(zip(compare.HEAD, compare.row(at([value + 0.01 for value in KD])), strict=True))
    assert row["recipe"] == "dkd" and row["metric"] == "eval/accuracy, %"
    assert (row["method"], row["control"], row["difference"]) == ("55.00", "`kd` 54.00", "+1.00 (1.00 to 1.00)")
    assert (row["a step"], row["GiB"], row["seconds"]) == ("2.00 (2.00 to 2.00) of `kd`", "1.50", "6 + 100 once")
    assert (row["verdict"], row["published"]) == ("holds here", "+0.5")
    unsure = compare.row(at([0.54, 0.55, 0.57, 0.53, 0.52]))
    assert unsure[-2].startswith("not shown (± ")


def of_lengths(taught: dict[int, list[float]], cost: list[float]) -> dict[str, lean.Lean]:
    """Losses by length and seed; alone 4 after 10 steps and 3 after 20, a second a step, with a teacher `cost` times that."""
    made = {"teacher": lean.Lean({"config": {}, "result": {}}, [{"step": 5, "train_s": 24.0}])}
    for steps, alone in ((10, 4.0), (20, 3.0)):
        for seed, times in enumerate(cost, 1):
            for arm, loss, seconds in (("labels", alone, 1.0), ("kd", taught[steps][seed - 1], times)):
                end = {"step": steps, "train_s": steps * seconds, "eval/loss": loss}
                made[f"{arm}/{steps}/{seed}"] = lean.Lean({"result": {"stopped": "finished"}}, [end])
    return made


TWO = Study(
    **DESIGN | dict(lengths=[20, 10], seeds=[1, 2], metric="eval/loss", claim=None, arms={"labels": "", "kd": ""})
)


def test_what_an_arm_saves_is_steps_times_the_cost_of_a_step() -> None:
    runs = of_lengths({10: [2.9, 3.0], 20: [2.0, 2.0]}, cost=[1.0, 1.44])
    saved = compare.saved(TWO, runs, "kd")
    assert saved is not None and saved.steps == (10, 20)
    assert saved.cost == pytest.approx((1.2, 1.0, 1.44)) and saved.share == pytest.approx([0.6, 0.5, 0.72])
    assert saved.seconds == pytest.approx((20, 12)) and (saved.verdict, saved.students) == ("faster", 3)
    told = compare.told_saved(TWO, runs)
    assert "kd: 10 steps in place of 20, each 1.20 times as long: 12 s of training in place of 20." in told
    assert "took 24 s, once: paid back after 3 students." in told


@pytest.mark.parametrize(("slower", "told"), [(1.01, "alike"), (0.93, "not shown to be alike")])
def test_the_own_part_of_a_step_is_to_take_as_long_with_a_teacher(slower: float, told: str) -> None:
    study = Study(
        recipe="r.py", baseline="alone", lengths=[10], seeds=[1, 2, 3], metric="eval/loss",
        arms={"alone": "", "kd": "--teachers t", "other": {"recipe": "o.py", "flags": "--teachers t"}},
    )  # fmt: skip
    made = {
        f"{arm}/10/{seed}": lean.Lean(
            {"config": {}, "result": {"stopped": "finished"}},
            [{"step": 10, "train_s": own + teacher + 0.5, "teacher_s": teacher, "data_s": 0.5, "eval/loss": 1.0}],
        )
        for arm, own, teacher in (("alone", 2.0, 0.0), ("kd", 2.0 * slower, 1.0), ("other", 2.0, 1.0))
        for seed in study.seeds
    }
    line = f"own part of a step, kd: {slower:.3f} ({slower:.3f} to {slower:.3f}) times that of alone, {told} within 2%"
    printed = compare.told(study, made)
    assert line in printed and "own part of a step, other" not in printed


def test_a_single_seed_that_is_worse_is_not_as_good() -> None:
    saved = compare.saved(TWO, of_lengths({10: [1.0, 3.01], 20: [2.0, 2.0]}, cost=[1.0, 1.1]), "kd")
    assert saved is not None and saved.steps == (20, 20), "the mean alone would say 10"
    never = of_lengths({10: [1.0, 3.1], 20: [1.0, 3.1]}, cost=[1.0, 1.0])
    assert compare.saved(TWO, never, "kd") is None and "not reached" in compare.told_saved(TWO, never)


@pytest.mark.parametrize(
    ("cost", "verdict"), [([1.9, 1.5], "faster"), ([1.9, 2.1], "not decided"), ([2.1, 2.3], "slower")]
)
def test_the_seconds_are_not_decided_where_the_cost_of_a_step_varies_past_one(cost: list[float], verdict: str) -> None:
    saved = compare.saved(TWO, of_lengths({10: [2.0, 2.0], 20: [2.0, 2.0]}, cost), "kd")
    assert saved is not None and saved.verdict == verdict and (saved.students is None) == (verdict != "faster")


def test_an_arm_may_have_lengths_of_its_own() -> None:
    study = Study(
        recipe="recipes/bert_kd.py", baseline="alone", lengths=[10], seeds=[1], metric="eval/loss",
        arms={"alone": {"lengths": [10, 15, 20]}, "kd": {"lengths": [10, 12]}},
    )  # fmt: skip
    assert study.shared_lengths == [10] and study.all_lengths == [10, 15, 20, 12]
    assert list(interleaved(study)) == [
        ("alone", 10, 1),
        ("kd", 10, 1),
        ("alone", 15, 1),
        ("alone", 20, 1),
        ("kd", 12, 1),
    ]
    made = {
        f"{arm}/{steps}/1": lean.Lean(
            {"config": {}, "result": {"stopped": "finished"}}, [{"step": steps, "train_s": factor * steps, "eval/loss": loss}]
        )
        for arm, steps, factor, loss in [
            ("alone", 10, 1, 5.0), ("alone", 15, 1, 4.5), ("alone", 20, 1, 4.0), ("kd", 10, 2, 4.6), ("kd", 12, 2, 3.9),
        ]
    }  # fmt: skip
    found = compare.saved(study, made, "kd")
    assert found is not None and found.steps == (12, 20) and found.share[0] == pytest.approx(1.2)
    assert "kd: 12 steps in place of 20" in compare.told(study, made)
    with pytest.raises(ValueError, match="has no length that the baseline has"):
        dataclasses.replace(study, arms={"alone": "", "kd": {"lengths": [12]}})


def test_what_cannot_be_compared_is_one_line() -> None:
    study, made = Study(**DESIGN), runs(labels=LABELS, kd=KD, new=KD)
    apart = {name.replace("new/10/", "new/10/9"): run for name, run in made.items()}
    with pytest.raises(ValueError, match='arm "new" and the baseline "labels" share no seed; only pairs are compared'):
        compare.compare(study, apart, 10)
    made["kd/10/2"].end["eval/accuracy"] = math.nan
    with pytest.raises(ValueError, match="kd/10/2 ended with a eval/accuracy that is no number"):
        compare.compare(study, made, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "study.json").write_text(json.dumps(DESIGN))
    lean.write(tmp_path, runs(labels=LABELS, kd=KD, new=KD))
    return tmp_path


Say = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs the command in this process; its exit code and what it said on both streams."""

    def run(*words: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["compare", *words])
        code: Any = 0
        try:
            compare.main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return run


def test_the_command_prints_the_table_and_draws_the_plot(folder: Path, tmp_path: Path, say: Say) -> None:
    code, out, errors = say(str(folder), "--plot", str(tmp_path / "forest.png"))
    assert (code, errors) == (0, [])
    assert "verdict: not shown; new less kd +0.00 (0.00 to 0.00), half-width 0.00; published: +0.5" in out
    assert (tmp_path / "forest.png").read_bytes().startswith(b"\x89PNG")
    figure = compare.plot(Study(**DESIGN), lean.read(folder))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["after 10 steps", "kd", "new"]
    assert "eval/ece" in say(str(folder), "--metric", "eval/ece")[1]


def test_what_the_command_line_gets_wrong_is_one_line(folder: Path, tmp_path: Path, say: Say) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert say(str(empty))[2] == [
        f"error: {empty}/study.json does not exist; give a study file such as launch/example_study.json"
    ]
    (empty / "study.json").write_text(json.dumps(DESIGN))
    assert say(str(empty))[::2] == (2, [f"error: {empty} has no runs.json; python -m kd_core.study {empty} makes it"])
    assert say("")[::2] == (
        2,
        ["error: argument STUDY: is blank; give a path, or leave it out (--help lists all flags)"],
    )
    code, _, errors = say(str(folder), "--metric", "eval/top1")
    assert (code, errors) == (2, ["error: --metric must be one of ['eval/accuracy', 'eval/ece'], got eval/top1"])
    (folder / "study.json").write_text(json.dumps(DESIGN | {"lengths": [10, 20]}))
    assert 'arm "labels" has no run of 20 steps yet' in say(str(folder))[2][-1]
