"""The small files of a study: what goes in comes out, each fact once."""

import json
from pathlib import Path
from typing import Any

import pytest

from kd_core.runs import folders, lean

STUDY = Path("runs/study/x")


def run(folder: Path, name: str, lines: list[dict[str, Any]], **config: Any) -> lean.Lean:
    """A run folder as a recipe leaves it, read."""
    own = folder / name
    own.mkdir(parents=True)
    (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"lr": 0.1, "teachers": [f"cache:{STUDY}/cache", f"{STUDY}/teacher"], "out": "x", "resume": True} | config
    record = {
        "recipe": "r",
        "config": config,
        "argv": ["a"],
        "versions": {"torch": "2"},
        "world_size": 1,
        "teachers": [{"name": "t", "eval/loss": 0.5, "seconds": 3.25, "fingerprint": {"weights": "a" * 64}}],
    }
    record["result"] = lines[-1] | {"stopped": "finished", "peak_memory_gib": 1.5}
    (own / "run.json").write_text(json.dumps(record))
    return lean.of_run(own, STUDY)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, lean.Lean]:
    logged = [{"step": step, "train_s": step / 3, "loss": 2.0, "kd_ratio": 0.5} for step in range(1, 7)]
    logged[2] |= {"eval/loss": 1 / 3}
    logged[5] |= {"eval/loss": 0.25, "eval/accuracy": 0.5}
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "build.json").write_text('{"seconds": 12.5}')
    (cache / "header.json").write_text('{"teacher": "runs/study/x/teacher"}')
    made = {"cache": lean.of_run(cache, STUDY), "teacher": run(tmp_path, "teacher", logged[:3], width=7, teachers=[])}
    made |= {f"a/6/{seed}": run(tmp_path, f"a/6/{seed}", logged, seed=seed) for seed in (1, 2)}
    return made | {f"b/6/{seed}": run(tmp_path, f"b/6/{seed}", logged, seed=seed, beta=8.0) for seed in (1, 2)}


def test_what_is_written_is_read_again(runs: dict[str, lean.Lean], tmp_path: Path) -> None:
    lean.write(tmp_path, runs)
    read = lean.read(tmp_path)
    assert list(read) == list(runs)
    for name, one in runs.items():
        assert read[name].record == one.record
        assert read[name].lines == [pytest.approx(line, rel=1e-6) for line in one.lines]
    lean.write(tmp_path / "cache", read)
    for file in ("runs.json", "runs.csv"):
        assert (tmp_path / "cache" / file).read_text() == (tmp_path / file).read_text()


def test_only_evaluations_and_the_end_are_kept_and_each_flag_stands_once(
    runs: dict[str, lean.Lean], tmp_path: Path
) -> None:
    lean.write(tmp_path, runs)
    text = (tmp_path / "runs.csv").read_text().splitlines()
    assert text[0] == "run,step,train_s,teacher_s,data_s,kd_ratio,eval/accuracy,eval/loss"
    assert text[1:4] == ["cache,0,12.5,,,,,", "teacher,3,1,,,0.5,,0.3333333", "a/6/1,3,1,,,0.5,,0.3333333"]
    assert [line.split(",")[1] for line in text if line.startswith("b/6/2")] == ["3", "6"]
    levels = json.loads((tmp_path / "runs.json").read_text())
    assert levels["all"]["config"] == {"lr": 0.1, "teachers": ["cache:{study}/cache", "{study}/teacher"]}
    assert levels["arms"] == {"a": {}, "b": {"config": {"beta": 8.0}}}
    assert levels["runs"]["b/6/2"] == {"config": {"seed": 2}}
    assert levels["runs"]["teacher"]["config"]["width"] == 7, "what was prepared stands whole"


def test_a_restored_run_says_the_same(runs: dict[str, lean.Lean], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    lean.restore(runs["b/6/1"], elsewhere / "b/6/1", elsewhere)
    record = json.loads((elsewhere / "b/6/1/run.json").read_text())
    assert record["config"]["teachers"] == [f"cache:{elsewhere}/cache", f"{elsewhere}/teacher"]
    assert record["result"]["stopped"] == "finished" and record["result"]["eval/accuracy"] == 0.5
    assert lean.of_run(elsewhere / "b/6/1", elsewhere) == runs["b/6/1"]
    lean.restore(runs["cache"], elsewhere / "cache", elsewhere)
    assert lean.of_run(elsewhere / "cache", elsewhere) == runs["cache"]
    (teacher,) = record["teachers"]
    assert set(teacher) == {"name", "eval/loss", "fingerprint"} and len(teacher["fingerprint"]) == folders.MARK


def test_only_paths_of_the_study_are_its_own() -> None:
    there = (
        '["runs/study/x/teacher", "cache:runs/study/x/cache", "my/runs/study/x/t", "runs/study/x2/t", "runs/study/x"]'
    )
    here = '["{study}/teacher", "cache:{study}/cache", "my/runs/study/x/t", "runs/study/x2/t", "runs/study/x"]'
    assert lean.from_study(there, STUDY) == here


def test_a_write_that_was_killed_between_the_files_loses_a_run_and_no_more(
    runs: dict[str, lean.Lean], tmp_path: Path
) -> None:
    lean.write(tmp_path, {name: one for name, one in runs.items() if name != "b/6/2"})
    before = (tmp_path / "runs.json").read_text()
    lean.write(tmp_path, runs)
    (tmp_path / "runs.json").write_text(before)
    assert list(lean.read(tmp_path)) == [name for name in runs if name != "b/6/2"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"all": {}, "arms": {}, "runs": {"a/6/1": {}}}'])
def test_damage_is_one_line(runs: dict[str, lean.Lean], tmp_path: Path, damage: str) -> None:
    lean.write(tmp_path, runs)
    (tmp_path / "runs.json").write_text(damage)
    with pytest.raises(ValueError, match=r"runs\.json (is|and runs\.csv do not fit together, or are) damaged"):
        lean.read(tmp_path)
    assert lean.read(tmp_path / "cache") == {}
