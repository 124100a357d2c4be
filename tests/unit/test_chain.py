"""What a chain leaves in its own folder: the last stage's run, with the seconds of all."""

import json
from pathlib import Path
from typing import Any

import pytest

from kd_core.runs import chain, folders, lean
from kd_core.runs.jobs import Job, finished
from kd_core.runs.sources import model_source
from kd_core.system.checked import DamagedError


def stage(folder: Path, name: str, train_s: float, memory: float) -> Job:
    """A finished run of two lines, with an export."""
    own = folder / name
    (own / "hf").mkdir(parents=True)
    (own / "hf" / "config.json").write_text("{}")
    (own / "hf" / "model.safetensors").write_text(name)
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 1.0, "train_s": train_s * step / 2, "teacher_s": 0.0, "sample_s": 0.25}
        for step in (1, 2)
    ]
    lines[-1]["eval/loss"] = train_s
    (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = lines[-1] | {"stopped": "finished", "peak_memory_gib": memory}
    config = {"steps": 2, "stage": name, "log_every": 1}
    record = {"recipe": "r", "config": config, "world_size": 1, "alpha": train_s, "result": result}
    folders.write_record(own, record | {"files": folders.digests(own)})
    return Job(name, own, (), 2, (), True)


def test_a_finished_chain_is_a_run_a_teacher_and_an_arm(tmp_path: Path) -> None:
    jobs = [stage(tmp_path, "one", 8.0, 3.0), stage(tmp_path, "two", 4.0, 2.0)]
    head = {"recipe": "r", "config": {"steps": 2, "stage": "all", "log_every": 1}, "world_size": 1, "id": "x"}
    folders.write_record(tmp_path, head)
    whole = Job("", tmp_path, (), 2, (), True)
    assert not finished(whole)
    for _ in range(2):  # by the same call again too
        chain.conclude(tmp_path, head, jobs)
    assert finished(whole)
    record, lines = folders.read_run(tmp_path)
    assert record["config"] == head["config"] and record["id"] == "x" and record["alpha"] == 4.0
    assert [line["train_s"] for line in lines] == [10.0, 12.0]
    result = record["result"]
    assert (result["train_s"], result["sample_s"], result["eval/loss"], result["peak_memory_gib"]) == (12, 0.5, 4, 3)
    assert lean.of_run(tmp_path, tmp_path.parent).end["train_s"] == 12
    assert model_source(str(tmp_path)) == str(tmp_path / "two" / "hf")


def test_a_damaged_export_of_the_last_stage_is_refused_by_the_name_of_the_chain(tmp_path: Path) -> None:
    jobs = [stage(tmp_path, "one", 8.0, 3.0), stage(tmp_path, "two", 4.0, 2.0)]
    chain.conclude(tmp_path, {"recipe": "r", "config": {}, "world_size": 1}, jobs)
    (tmp_path / "two" / "hf" / "model.safetensors").write_text("owt")
    with pytest.raises(DamagedError, match=str(tmp_path)):
        model_source(str(tmp_path))
