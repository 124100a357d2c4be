"""The loop: several engines, none at all, stages; each killed and resumed to the bit, and mistakes that cannot train."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kd_core.runs.folders import read_run
from kd_core.system.files import file_digest
from tests import warm
from tests.conftest import ROOT, cpu_environment, free_port

TOYS = Path(__file__).with_name("toys")
TIMES = {"train_s", "teacher_s", "data_s", "sample_s"}
STEPS = "--steps 8 --save-every 3 --eval-every 4 --log-every 1".split()
BATCH = "--global-batch-size 8 --micro-batch-size 1 --lr 1e-2 --clip 1".split()


def begin(script: str, words: list[str], ranks: int, folder: Path) -> list[warm.Popen]:
    return warm.begin(ranks, [TOYS / script, *words], folder, PYTHONPATH=str(ROOT))


def run(script: str, words: list[str], ranks: int, folder: Path) -> None:
    codes = [process.wait(120) for process in begin(script, words, ranks, folder)]
    assert codes == [0] * ranks, (folder / "0.log").read_text()[-3000:]


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    complete = file.read_text().split("\n")[:-1] if file.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in complete]


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)


def check_killed_and_resumed(script: str, words: list[str], folder: Path) -> list[dict[str, Any]]:
    """The lines of a whole run on 2 ranks, which one that is killed and resumed has too."""
    run(script, [*words, "--out", "whole"], 2, folder)
    killed = begin(script, [*words, "--out", "killed"], 2, folder)
    wait_until(lambda: len(lines(folder / "killed")) >= 5)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(script, [*words, "--out", "killed", "--resume"], 2, folder)
    whole = lines(folder / "whole")
    assert len(whole) == 8
    assert lines(folder / "killed") == whole
    return whole


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A DeepSpeed config in float32 of each ZeRO stage."""
    folder = tmp_path_factory.mktemp("configs")
    for stage in range(4):
        (folder / f"{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return [str(folder / f"{stage}.json") for stage in range(4)]


SLOW = [
    (1, ["--any-number", "--counted"]),
    (0, []),
    (1, []),
    (2, []),
    (3, []),
    (0, ["--any-number"]),
    (1, ["--any-number"]),
    (3, ["--any-number"]),
]


@pytest.mark.parametrize(
    ("stage", "more"), [(2, ["--any-number"]), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_two_networks_resume_exactly_and_agree_with_one_rank(
    stage: int, more: list[str], configs: list[str], tmp_path: Path
) -> None:
    two = check_killed_and_resumed(
        "two_networks.py", [*STEPS, *BATCH, *more, "--deepspeed-config", configs[stage]], tmp_path
    )
    run("two_networks.py", [*STEPS, *BATCH, "--deepspeed-config", configs[0], "--out", "one"], 1, tmp_path)
    for ours, alone in zip(two, lines(tmp_path / "one"), strict=True):
        assert (
            ours.keys() == alone.keys() >= {"loss", "grad_norm", "term", "judge_loss", "judge_real", "judge_grad_norm"}
        )
        assert ours == pytest.approx(alone, rel=2e-5, abs=1e-6)
    assert two[-1]["points"] > two[-1]["samples"] / 8, "rows are ragged"


@pytest.mark.slow
def test_points_as_parameters_resume_exactly_without_an_engine_of_deepspeed(tmp_path: Path) -> None:
    whole = check_killed_and_resumed("images_as_parameters.py", STEPS, tmp_path)
    assert whole[-1]["eval/loss"] != whole[3]["eval/loss"]
    assert "sample_s" in (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_a_search_without_any_engine_resumes_exactly(tmp_path: Path) -> None:
    whole = check_killed_and_resumed("search.py", STEPS, tmp_path)
    assert whole[-1]["eval/width"] == max(line["width"] for line in whole)
    assert len({line["width"] for line in whole}) > 4


@pytest.mark.slow
def test_a_chain_killed_in_its_second_stage_continues_there(tmp_path: Path) -> None:
    words = ["--steps", "3000", "--save-every", "100", "--log-every", "1000", "--eval-every", "3000", "--out", "out"]
    command = [sys.executable, str(TOYS / "stages.py"), *words]
    env = cpu_environment(PYTHONPATH=str(ROOT))
    with (tmp_path / "log").open("a") as log:
        killed = warm.Popen(command, cwd=tmp_path, env=env, stderr=log, start_new_session=True)
        wait_until(lambda: any((tmp_path / "out" / "two" / "checkpoints").glob("step*")))
        children = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True).stdout.split()
        for process in map(int, [str(killed.pid), *children]):
            os.kill(process, signal.SIGKILL)
        killed.wait()
    first = (tmp_path / "out" / "one" / "run.json").stat().st_mtime_ns
    assert json.loads((tmp_path / "out" / "one" / "run.json").read_text())["result"]["stopped"] == "finished"
    assert "result" not in json.loads((tmp_path / "out" / "two" / "run.json").read_text())
    assert "result" not in json.loads((tmp_path / "out" / "run.json").read_text())
    done = warm.run(command, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "one" / "run.json").stat().st_mtime_ns == first, "the first stage ran again"
    assert "from step" in (tmp_path / "out" / "two.log").read_text().rpartition("--- resumed")[2]
    assert json.loads((tmp_path / "out" / "two" / "run.json").read_text())["result"]["step"] == 3000
    whole, (one, two) = read_run(tmp_path / "out"), (read_run(tmp_path / "out" / name) for name in ("one", "two"))
    assert whole[0]["config"]["stage"] == "all" and whole[0]["result"]["stopped"] == "finished"
    assert [line["step"] for line in whole[1]] == [line["step"] for line in two[1]]
    spent = one[0]["result"]["train_s"] + two[0]["result"]["train_s"]
    assert whole[0]["result"]["train_s"] == whole[1][-1]["train_s"] == pytest.approx(spent)
    again = warm.run([*command[:2], "--out", "out", "--resume"], cwd=tmp_path, env=env)
    assert again.returncode == 0, again.stderr
    changed = warm.run([*command, "--lr", "0.2"], cwd=tmp_path, env=env)
    assert changed.returncode == 2 and "was begun with lr 0.1, now it is 0.2" in changed.stderr
    launched = cpu_environment(PYTHONPATH=str(ROOT), WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    refused = warm.run(command, cwd=tmp_path, env=launched)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"without a launcher: python {TOYS / 'stages.py'} --steps 3000" in refused.stderr


MISTAKES = {
    "two backwards": "16 backward passes before Step.update, the engine counts on 8",
    "set rows": "Step.rows cannot be set; Step.supervise takes the rows of this rank",
    "late rows": "Step.supervise comes before the first Step.backward",
    "unfrozen": "a loss of the engine 'student' passes through 'judge', called as an engine",
    "unfrozen module": "a loss of the engine 'student' has given gradients to 'judge'",
    "unloadable": "the state of 'share' could not be loaded again",
    "taken name": "the log has 'loss' for something else",
    "no scalar": "the loss is a sum over rows, a tensor without dimensions; got the shape [2]",
    "no update": "a step ended after Step.backward without Step.update of student",
    "twice": "Step.update of the engine 'student' without a Step.backward since its last update",
    "break": "the loop over Run.steps was left before its last step; raise Stopped",
}


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 3))])
def test_a_mistake_is_one_clear_line_and_trains_nothing(stage: int, configs: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(TOYS / "mistakes_worker.py"), configs[stage], str(tmp_path), *MISTAKES]
    done = warm.run(command, env=cpu_environment(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr[-3000:]
    for mistake, (said, steps) in json.loads(done.stdout.splitlines()[-1]).items():
        assert said.startswith(MISTAKES[mistake]) and "\n" not in said
        assert steps == (3 if mistake == "unloadable" else 0), f"{mistake} trained"  # at the first checkpoint


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("other terms", "ranks have other terms than this one's of 'student': loss, "),
        pytest.param(
            "other parameters",
            "other parameters of 'student' have a gradient on this rank than elsewhere",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "other buffers",
            "ranks have other buffers of 'judge', such as running statistics",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_differs_between_ranks_is_refused_on_all(
    mistake: str, message: str, configs: list[str], tmp_path: Path
) -> None:
    words = [*STEPS, *BATCH, "--deepspeed-config", configs[1], "--out", "run", "--mistake", mistake]
    assert all(process.wait(120) for process in begin("two_networks.py", words, 2, tmp_path))
    for rank in range(2):
        assert f"LoopError: {message}" in (tmp_path / f"{rank}.log").read_text()
    assert len(lines(tmp_path / "run")) == (3 if mistake == "other buffers" else 0)


@pytest.mark.parametrize(
    ("without", "message"), [("judge", "nothing of the engine 'judge'"), ("share", "nothing of 'share'")]
)
def test_a_checkpoint_that_lacks_something_is_one_line(
    without: str, message: str, configs: list[str], tmp_path: Path
) -> None:
    words = [*STEPS, *BATCH, "--deepspeed-config", configs[0], "--out", "run", "--max-minutes", "1e-9"]
    run("two_networks.py", words, 1, tmp_path)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    if without == "judge":
        manifest = {name: digest for name, digest in manifest.items() if not name.startswith("judge/")}
        for file in (checkpoint / "judge").iterdir():
            file.unlink()
        (checkpoint / "judge").rmdir()
    else:
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        torch.save(state | {"kept": {}}, checkpoint / "state.pt")
        manifest["state.pt"] = file_digest(checkpoint / "state.pt")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (process,) = begin("two_networks.py", ["--out", "run", "--resume"], 1, tmp_path)
    assert process.wait(120) == 2
    assert message in (tmp_path / "0.log").read_text().splitlines()[-1]


LONG = "--steps 6 --global-batch-size 16 --micro-batch-size 2 --eval-every 2 --log-every 1 --lr 1e-2".split()


@pytest.mark.parametrize(
    ("ranks", "stage", "more"),
    [
        (1, 0, []),
        pytest.param(2, 0, ["--counts"], marks=pytest.mark.slow),
        *(pytest.param(2, stage, [], marks=pytest.mark.slow) for stage in range(4)),
    ],
)
def test_a_long_step_and_a_long_evaluation_are_left_on_a_signal_and_nothing_is_lost(
    ranks: int, stage: int, more: list[str], configs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = bool(more)  # what the recipe keeps changes within a step, which is not given up then
    stops = {"step 3 batch 1": (3 + counts, 1), "evaluation 5 batch 1": (6, 2)}  # steps taken, whole evaluations
    monkeypatch.setenv("STOPS", ",".join(stops))
    run("long_steps.py", ["in-turn", *LONG, *more, "--deepspeed-config", configs[stage]], ranks, tmp_path)
    for place, (taken, evaluations) in stops.items():
        folder = tmp_path / f"stopped at {place}"
        result = json.loads((folder / "run.json").read_text())["result"]
        assert (result["stopped"], result["step"]) == ("SIGTERM", taken)
        assert [line["step"] for line in lines(folder)] == list(range(1, taken + 1))
        assert len([line for line in lines(folder) if "eval/score" in line]) == evaluations
        assert (folder / "checkpoints" / f"step{taken:08d}").exists()
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_deepspeed_does_not_kill_a_rank_that_takes_more_than_30_seconds_to_save(
    configs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP_AT", "step 3 batch 1")
    monkeypatch.setenv("SECONDS_THEN", "35")
    words = [*LONG, "--deepspeed-config", configs[0], "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "2", "--master_port"]
    command += [str(free_port()), str(TOYS / "long_steps.py"), *words]
    started = warm.Popen(command, env=cpu_environment(PYTHONPATH=str(ROOT)), start_new_session=True)
    started.wait(150)
    wait_until(lambda: "result" in json.loads((tmp_path / "run" / "run.json").read_text()))
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    assert (result["stopped"], result["step"]) == ("SIGINT", 3)
    wait_until(
        lambda: (
            not [
                one for one in psutil.process_iter(["cmdline"]) if str(tmp_path / "run") in (one.info["cmdline"] or [])
            ]
        )
    )
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path / "run") in (one.info["cmdline"] or [])]


def test_a_run_that_hangs_ends_within_its_grace_and_says_what_is_lost(
    configs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP_AT", "step 3 batch 1")
    monkeypatch.setenv("SECONDS_THEN", "1000")
    words = [*LONG, "--deepspeed-config", configs[0], "--save-every", "2", "--grace-seconds", "1", "--out", "run"]
    env = cpu_environment(PYTHONPATH=str(ROOT))
    command = [sys.executable, str(TOYS / "long_steps.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.splitlines()[-1] == (
        "error: SIGINT came 1 s ago (--grace-seconds) and the run could not save: steps 3 to 3 are lost; "
        "continue with --resume"
    )
