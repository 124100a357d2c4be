"""A study's design, and what happens to it when its runs fail, are stopped or killed. Its recipe here trains nothing."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kd_core import study
from kd_core.runs import jobs
from tests.conftest import ROOT, cpu_environment

# A step is a pause, a checkpoint a file with its number. `begun` and `ended` lines go to events in the working folder.
RECIPE = """
import dataclasses, json, os, signal, sys, time
from pathlib import Path
from kd_core import cli
from kd_core.runs import code
from kd_core.training.flags import TrainFlags

@dataclasses.dataclass(frozen=True)
class Config(TrainFlags):
    teachers: tuple[str, ...] = ()
    kd_ratio: float = 0
    pause_ms: int = 1
    crash_at: int = 0
    save_s: float = 0.5
    data: str = "none"

    def __post_init__(self):
        super().__post_init__()
        self.check("kd_ratio", bool(self.teachers) or not self.kd_ratio, "0 without --teachers")

def write(file, text):
    file.with_suffix(".tmp").write_text(text)
    file.with_suffix(".tmp").rename(file)

def note(what):
    with open("events", "a") as events:
        events.write(f"{what} {'/'.join(out.parts[out.parts.index('my out') + 1:])} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")

if __name__ == "__main__":
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    with cli.one_line_errors():
        cfg = cli.parse(Config)
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        out = Path(cfg.out)
        if (out / "run.json").exists() != cfg.resume or (not cfg.resume and out.exists()):
            raise ValueError("--resume does not fit the folder")
        out.mkdir(parents=True, exist_ok=True)
        first = int((out / "step").read_text()) if (out / "step").exists() else 0
        run = dict(recipe=Path(__file__).stem, config=dataclasses.asdict(cfg), world_size=1)
        run |= dict(hardware=dict(device="cpu", name="none", count=1), code=code.digests(Path(__file__)))
        write(out / "run.json", json.dumps(run))
        note(f"begun {first}")
        lines = (out / "metrics.jsonl").read_text().splitlines()[:first] if first else []
        for step in range(first + 1, cfg.steps + 1):
            time.sleep(cfg.pause_ms / 1000)
            if step == cfg.crash_at:
                raise ValueError("--crash-at was reached")
            lines.append(json.dumps(dict(
                step=step, samples=step, kd_ratio=0, teacher=[], train_s=step * (1 + 0.01 * cfg.seed), teacher_s=0.0,
                data_s=0.0, **{"eval/loss": 1 + (1 + 0.1 * cfg.seed) / step},
            )))
            write(out / "metrics.jsonl", "".join(line + "\\n" for line in lines))
            if step % 10 == 0 or stopped:
                write(out / "step", str(step))
            if stopped:
                time.sleep(cfg.save_s)
                write(out / "run.json", json.dumps(run | dict(result=dict(json.loads(lines[-1]), stopped="SIGTERM"))))
                note(f"stopped {step}")
                sys.exit(0)
        write(out / "run.json", json.dumps(run | dict(result=dict(json.loads(lines[-1]), stopped="finished"))))
        note(f"ended {cfg.steps}")
"""

DESIGN: dict[str, Any] = {
    "recipe": "recipe.py",
    "arms": {"plain": "", "kd": "--teachers {teacher} --kd-ratio 0.5"},
    "baseline": "plain",
    "lengths": [20, 40],
    "seeds": [1, 2],
    "teacher": "--steps 5",
}

CLAIM = {"arm": "kd", "against": "plain", "setting": "a pause", "criterion": "below", "paper": "-1"}


class Folder:
    """A working folder with the recipe above and a study file, and the studies started in it."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, folder / "my out"
        (folder / "recipe.py").write_text(RECIPE)

    def write(self, **entries: Any) -> Path:
        (self.folder / "study.json").write_text(json.dumps(DESIGN | entries))
        return self.folder / "study.json"

    def start(self, *words: str, study: str = "study.json") -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "kd_core.study", study, "--out", "my out", *words]
        pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # A shell that starts this in the background has its children ignore SIGINT.
        pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, cwd=self.folder, env=cpu_environment(), **pipes)

    def run(self, *words: str, study: str = "study.json") -> tuple[int, list[str]]:
        process = self.start(*words, study=study)
        _, err = process.communicate(timeout=120)
        return process.returncode, err.splitlines()

    def events(self) -> list[list[str]]:
        file = self.folder / "events"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def runs(self) -> list[psutil.Process]:
        """The recipe's processes that are alive."""
        here = {"cwd": str(self.folder)}
        alive = [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.info | here == p.info]
        return [p for p in alive if any(word.startswith("my out/") for word in p.info["cmdline"] or [])]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path)
    folder.write()
    yield folder
    for process in folder.runs():
        process.kill()


def wait_for(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def test_arms_are_innermost_and_take_turns_in_going_first() -> None:
    plan = study.Study("r.py", {"a": "", "b": "", "c": ""}, "a", [10, 20, 30], [1, 2, 3])
    order = list(study.interleaved(plan))
    assert len(order) == len(set(order)) == 27
    blocks = [order[i : i + 3] for i in range(0, 27, 3)]
    for block in blocks:
        assert {arm for arm, *_ in block} == {"a", "b", "c"}
        assert len({point for _, *point in map(list, block) for point in [tuple(point)]}) == 1
    assert order[:9] == [point for point in order if point[2] == 1], "the first seed is complete first"
    assert Counter((block[0][0], block[0][1]) for block in blocks) == {
        (arm, steps): 1 for arm in "abc" for steps in (10, 20, 30)
    }


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"arm": {}}, 'has an unknown entry "arm"; its entries are recipe, arms, baseline,'),
        ({"arms": {"kd": ""}}, '"arms" must be two or more names'),
        ({"arms": {"plain": "", "../kd": ""}}, '"arms" must be two or more names'),
        ({"arms": {"plain": "", "report": ""}}, '"arms" must be two or more names'),
        ({"arms": {"plain": "", "kd": ["--seed"]}}, '"arms" must be two or more names'),
        ({"baseline": "base"}, "\"baseline\" must be one of the arms ['plain', 'kd'], got \"base\""),
        ({"lengths": [10, 10]}, '"lengths" must be a list of different numbers of steps, got [10, 10]'),
        ({"seeds": [1.5]}, '"seeds" must be a list of different seeds, got [1.5]'),
        ({"seeds": []}, '"seeds" must be a list of different seeds, got []'),
        ({"ranks": 0}, '"ranks" must be a number of processes, at least 1, got 0'),
        ({"arms": {"plain": "", "study.json": ""}}, '"arms" must be two or more names'),
        ({"arms": {"plain": "", "teacher.log": ""}}, '"arms" must be two or more names'),
        ({"arms": {"plain": "", "kd": "--data 'a"}}, '"arms" must be two or more names'),
        ({"flags": "--data 'a b"}, '"flags" must be flags as one text, its quotes closed'),
        ({"teacher": '--data "a'}, '"teacher" must be flags as one text, its quotes closed'),
        ({"lower_is_better": 1}, '"lower_is_better" must be true or false, got 1'),
        ({"arms": {"plain": "", "kd": {"flag": ""}}}, '"arms" must be two or more names'),
        ({"arms": {"plain": "", "kd": {"seeds": []}}}, '"arms" must be two or more names'),
        ({"prepare": {"kd": "x.py"}}, '"prepare" must be names'),
        ({"prepare": {"cache": ""}}, '"prepare" must be names'),
        (
            {"claim": {"arm": "kd"}},
            '"claim" must be an object of the texts against, arm, criterion, paper, setting, got',
        ),
        (
            {"claim": CLAIM | {"against": "none"}},
            '"claim": "against" must be one of the arms [\'plain\', \'kd\'], got "none"',
        ),
        ({"may_differ": "data"}, '"may_differ" must be a list of fields of the runs\' config, got "data"'),
    ],
)
def test_a_study_file_that_will_not_do(folder: Folder, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        study.read_study(folder.write(**entries))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"recipe": "nowhere.py"}, '"recipe" nowhere.py does not exist'),
        ({"recipe": "kd_core/losses/distillation.py"}, '"recipe" kd_core/losses/distillation.py has no Config'),
        ({"flags": "--sedd 3"}, "unknown flag --sedd; did you mean --seed?"),
        ({"flags": "--seed=3"}, 'arm "plain": the study itself sets --seed=3; remove it'),
        ({"arms": {"plain": "", "kd": "--out x"}}, 'arm "kd": the study itself sets --out; remove it'),
        ({"arms": {"plain": "", "kd": "--kd-ratio 0.5"}}, 'arm "kd": --kd-ratio must be 0 without --teachers'),
        ({"teacher": None}, 'arm "kd": {teacher} needs the entry "teacher"'),
        ({"metric": "eval/los"}, "--metric eval/los is not known here"),
        ({"arms": {"plain": "", "kd": "--data x"}}, "the arms must have the same data"),
        ({"prepare": {"cache": "recipe.py --data {kd}"}}, '{kd} needs the entry "kd"'),
        ({"prepare": {"cache": "-m caches --out x"}}, "the study itself sets --out; remove it"),
        (
            {"claim": CLAIM, "arms": {"plain": "", "kd": {"recipe": "other.py"}}},
            'arm "kd" has save_s 2 by its recipe',
        ),
        ({"may_differ": ["dataa"]}, "--may-differ dataa: no run has such a field"),
    ],
)
def test_flags_are_refused_before_anything_runs(
    folder: Folder, entries: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.folder)
    (folder.folder / "other.py").write_text(RECIPE.replace("save_s: float = 0.5", "save_s: float = 2"))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        study.design(study.read_study(folder.write(**entries)), folder.out)
    assert message in str(error.value)


def test_a_study_may_say_what_may_differ_and_which_is_better(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.folder)
    arms = {"plain": "", "kd": "--data x"}
    plan = study.read_study(folder.write(arms=arms, may_differ=["data"], metric="new", lower_is_better=False))
    assert len(study.design(plan, folder.out)) == 9


def test_every_gpu_takes_a_run_and_jobs_may_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(number: int | None, ranks: int) -> list[str | None]:
        return [place.get("CUDA_VISIBLE_DEVICES") for place in jobs.places(number, ranks)]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible(None, 1) == ["0", "1", "2", "3"]
    assert visible(None, 2) == ["0,1", "2,3"]
    assert visible(None, 3) == ["0,1,2"]
    assert visible(3, 2) == ["0,1", "2,3", "0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-7,6")
    assert visible(None, 1) == ["4", "5", "GPU-7", "6"]
    with pytest.raises(ValueError, match='"ranks" is 8, but there are 4'):
        jobs.places(None, 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("RANK", "1")
    (place,) = jobs.places(None, 2)
    assert place["NUM_GPUS"] == "2" and "RANK" not in place
    with pytest.raises(ValueError, match="--jobs must be at least 1, got 0"):
        jobs.places(0, 1)


def test_the_whole_design_runs_in_order_and_once(folder: Folder) -> None:
    code, lines = folder.run()
    assert code == 0, lines
    names = ["teacher", "plain/20/1", "kd/20/1", "kd/40/1", "plain/40/1", "kd/20/2", "plain/20/2"]
    names += ["plain/40/2", "kd/40/2"]
    assert [event[2] for event in folder.events()[::2]] == names
    assert [line.split()[3] for line in lines if " of 9: " in line] == names
    config = json.loads((folder.out / "kd/20/1/run.json").read_text())["config"]
    assert config["teachers"] == ["my out/teacher"]
    assert json.loads((folder.out / "report/kd/report.json").read_text())["metric"] == "eval/loss"

    folder.write(seeds=[1, 2, 3], metric="eval/los", lower_is_better=True)
    code, lines = folder.run()
    assert code == 2
    assert lines[-1] == 'error: "metric" eval/los is none of those that my out/plain/20/3 has: eval/loss'
    assert len(folder.events()) == 20, "what had finished ran again"


# What is no run writes manifest.json last, and says what it took.
PRODUCT = """
import json, sys
from pathlib import Path
out = Path(sys.argv[-1])
out.mkdir()
(out / "build.json").write_text(json.dumps({"seconds": 7.5}))
(out / "header.json").write_text(json.dumps({"teacher": sys.argv[2]}))
(out / "manifest.json").write_text(json.dumps(sys.argv[1:]))
"""


def test_a_study_of_a_method_goes_on_in_a_later_clone(folder: Folder) -> None:
    """What stands in the two small files is not run again; what is missing is, with what it needs."""
    (folder.folder / "caches.py").write_text(PRODUCT)
    (folder.folder / "method.py").write_text(RECIPE.replace("save_s: float", "beta: float = 1\n    save_s: float"))
    kd = {"recipe": "method.py", "flags": "--teachers cache:{cache} --kd-ratio 0.5 --beta 2", "seeds": [1, 2, 3]}
    entries = dict(
        arms={"plain": "", "kd": kd}, prepare={"cache": "-m caches --teacher {teacher}"}, lengths=[20], claim=CLAIM
    )
    lines = folder.folder / "lines"
    lines.mkdir()
    (lines / "study.json").write_text(folder.write(**entries).read_text())

    def run() -> tuple[str, list[list[str]]]:
        before = len(folder.events())
        command = [sys.executable, "-m", "kd_core.study", "lines", "--out", "my out"]
        env = cpu_environment(PYTHONPATH=f"{folder.folder}:{ROOT}")
        done = subprocess.run(command, cwd=folder.folder, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout, folder.events()[before:]

    told, events = run()
    begun = [event[2] for event in events if event[0] == "begun"]
    assert begun == ["teacher", "plain/20/1", "kd/20/1", "kd/20/2", "plain/20/2", "kd/20/3"]
    assert json.loads((folder.out / "cache/manifest.json").read_text())[:2] == ["--teacher", "my out/teacher"]
    assert "verdict: does not count: `kd` is not better than `plain`; kd less plain +0.0000" in told
    assert re.search(r"before the runs: teacher \d s, cache 8 s", told)
    assert json.loads((lines / "runs.json").read_text())["arms"]["kd"]["config"]["teachers"] == ["cache:{study}/cache"]
    files = {file.name: file.read_text() for file in lines.iterdir()}

    shutil.rmtree(folder.out)  # a later clone
    assert run() == (told, [])
    assert {file.name: file.read_text() for file in lines.iterdir()} == files

    shutil.rmtree(folder.out)
    (lines / "study.json").write_text(folder.write(**entries, seeds=[1, 2, 4]).read_text())
    _, events = run()
    assert [event[2] for event in events if event[0] == "begun"] == ["plain/20/4"], "a teacher that nobody needs"

    shutil.rmtree(folder.out)
    kd["seeds"] = [1, 2, 3, 4]
    (lines / "study.json").write_text(folder.write(**entries, seeds=[1, 2, 4]).read_text())
    _, events = run()
    assert [event[2] for event in events if event[0] == "begun"] == ["teacher", "kd/20/4"]

    shutil.rmtree(folder.out)
    (lines / "study.json").write_text(folder.write(**entries, flags="--lr 0.5").read_text())
    code, errors = folder.run(study="lines")
    assert code == 2 and not folder.out.joinpath("plain").exists()
    assert errors[-1].startswith(
        "error: plain/20/1 in runs.json was made with lr 0.0005, now it is 0.5; undo the change"
    )


def test_a_run_waits_for_what_it_names_alone(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.folder)
    (folder.folder / "caches.py").write_text(PRODUCT)
    arms = {"plain": "", "kd": "--teachers cache:{cache} --kd-ratio 0.5"}
    file = folder.write(arms=arms, prepare={"cache": "-m caches --teacher {teacher}"}, lengths=[20], seeds=[1])
    runs = study.design(study.read_study(file), folder.out)
    assert {run.name: run.needs for run in runs} == {
        "teacher": (), "cache": ("teacher",), "plain/20/1": (), "kd/20/1": ("cache",)
    }  # fmt: skip
    assert study.still_to_make(runs, ["kd/20/1"]) == {"plain/20/1"}
    assert study.still_to_make(runs, ["teacher", "plain/20/1"]) == {"cache", "kd/20/1"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, None),
        ({"log_every": 7, "out": "elsewhere"}, None),
        (
            {"kd_ratio": 0.6},
            "kd/20/1 was begun with kd_ratio 0.6, now it is 0.5; undo the change, remove that",
        ),
        ({"recipe": "other"}, 'kd/20/1 was begun with recipe "other", now it is "recipe"'),
        ({"ranks": 2}, "kd/20/1 was begun with ranks 2, now it is 1"),
    ],
)
def test_a_run_begun_with_other_flags_is_never_mixed_in(
    folder: Folder, config: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.folder)
    plan = study.read_study(folder.write())
    run = next(run for run in study.design(plan, folder.out) if run.name == "kd/20/1")
    before = dataclasses.asdict(run.config) | config
    run.folder.mkdir(parents=True)
    record = {"recipe": before.pop("recipe", "recipe"), "world_size": before.pop("ranks", 1), "config": before}
    (run.folder / "run.json").write_text(json.dumps(record))
    now = {"recipe": "recipe", "ranks": 1, "config": dataclasses.asdict(run.config)}
    if message is None:
        jobs.check_unchanged(run, **now)
    else:
        with pytest.raises(ValueError) as error:
            jobs.check_unchanged(run, **now)
        assert message in str(error.value)


def test_data_of_a_study_may_be_moved_and_is_no_other(folder: Folder) -> None:
    """What has finished is kept, what is to come is made with the same content or not at all."""
    known = RECIPE.replace("world_size=1)", "world_size=1, data=Path(cfg.data).read_text())")
    (folder.folder / "recipe.py").write_text(known)
    (folder.folder / "a.txt").write_text("the same")
    design: dict[str, Any] = dict(arms={"plain": "", "kd": "--crash-at 0"}, teacher=None, lengths=[20])
    folder.write(**design, flags="--data a.txt", seeds=[1])
    assert folder.run()[0] == 0
    (folder.folder / "a.txt").rename(folder.folder / "b.txt")
    folder.write(**design, flags="--data b.txt", seeds=[1, 2])
    code, lines = folder.run()
    assert code == 0 and "--data was a.txt and is now b.txt: taken if its content is the same" in lines, lines
    assert [event[2] for event in folder.events() if event[0] == "begun"][2:] == ["kd/20/2", "plain/20/2"]
    (folder.folder / "c.txt").write_text("another")
    folder.write(**design, flags="--data c.txt", seeds=[1, 2, 3])
    code, lines = folder.run()
    assert code == 2
    assert lines[-1].startswith("error: plain/20/3 was made with another data than plain/20/1, for which both"), lines


@pytest.mark.parametrize("record", ["{}", '{"recipe": "recipe", "world', "[]", '{"config": 1, "result": null}', "\xff"])
def test_a_damaged_run_is_named(folder: Folder, record: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.folder)
    plan = study.read_study(folder.write())
    run = study.design(plan, folder.out)[1]
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_bytes(record.encode("latin1"))
    with pytest.raises(ValueError, match=r"plain/20/1/run\.json is damaged"):
        jobs.check_unchanged(run, dataclasses.asdict(run.config), recipe="recipe")


def test_what_the_command_line_gets_wrong_is_one_line(folder: Folder) -> None:
    assert folder.run("--out", "")[1] == [
        "error: argument --out: is blank; give a path, or leave it out (--help lists all flags)"
    ]
    assert folder.run("--job", "x") == (2, ["error: argument --jobs: invalid int value: 'x' (--help lists all flags)"])


def test_why_a_resumed_run_ended_is_what_it_said_last(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.folder)
    run = study.design(study.read_study(folder.write()), folder.out)[0]
    folder.out.mkdir()
    run.log.write_bytes(b"error: the disk is full\n" + jobs.RESUMED + b"half a line")
    assert jobs.why_ended(run, 1) == f"half a line ({run.log})"


def test_a_folder_that_holds_something_else_is_refused(folder: Folder) -> None:
    folder.out.mkdir()
    (folder.out / "thesis.tex").touch()
    code, lines = folder.run()
    assert (code, lines) == (2, ["error: --out my out exists and holds no study; choose another folder"])
    assert [path.name for path in folder.out.iterdir()] == ["thesis.tex"]


def test_a_run_that_fails_stops_the_study_with_its_own_line_and_code(folder: Folder) -> None:
    arms = {"plain": "", "kd": "--pause-ms 50 --crash-at 30", "other": "--pause-ms 200"}
    folder.write(arms=arms, teacher=None, may_differ=["pause_ms", "crash_at"])
    code, lines = folder.run("--jobs", "2")
    assert code == 2
    errors = [line for line in lines if line.startswith("error:")]
    assert errors == ["error: kd/40/1: --crash-at was reached (my out/kd/40/1.log)"]
    assert lines[-1].endswith("runs have finished; the same call with --out my out continues")
    assert not folder.runs(), "the other run goes on"
    assert json.loads((folder.out / "plain/20/1/run.json").read_text())["result"]["stopped"] == "finished"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_has_the_run_save_and_says_how_to_go_on(folder: Folder, number: int, code: int) -> None:
    folder.write(flags="--pause-ms 40", lengths=[200], seeds=[1], teacher=None, arms={"plain": "", "kd": "--lr 1"})
    process = folder.start()
    wait_for(lambda: (folder.out / "kd/200/1/step").exists())
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.splitlines()[-1] == "1 of 2 runs have finished; the same call with --out my out continues"
    assert folder.events()[-1][0] == "stopped"
    assert not folder.runs()


def test_kill_9_of_the_study_and_of_a_run(folder: Folder) -> None:
    arms = {"plain": "", "kd": "--lr 1"}
    folder.write(flags="--pause-ms 40 --save-s 5", seeds=[1], lengths=[100, 20], teacher=None, arms=arms)
    killed = folder.start()
    wait_for(lambda: (folder.out / "plain/100/1/step").exists())
    killed.kill()
    again = folder.start()  # the run of the first call is still saving
    wait_for(lambda: (folder.out / "kd/100/1/step").exists())
    events = [event[:3:2] for event in folder.events()]
    assert events[:3] == [["begun", "plain/100/1"], ["stopped", "plain/100/1"], ["begun", "plain/100/1"]]
    assert (folder.out / "plain/100/1.log").read_bytes().count(jobs.RESUMED) == 1, "the log began anew"
    (run,) = folder.runs()
    os.kill(run.pid, signal.SIGKILL)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 128 + signal.SIGKILL
    assert "error: kd/100/1: killed by SIGKILL (my out/kd/100/1.log)" in err.splitlines()
    (folder.out / "plain/20/1").mkdir(parents=True)  # as by a kill before the run had claimed it
    (folder.out / "plain/20/1/.run.json.tmp").touch()
    code, lines = folder.run()
    assert code == 0, lines
    for run_json in folder.out.glob("*/*/*/run.json"):
        metrics = [json.loads(line) for line in run_json.with_name("metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in metrics] == list(
            range(1, json.loads(run_json.read_text())["config"]["steps"] + 1)
        )


def test_a_second_study_in_the_same_folder_waits_then_gives_up(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.out.mkdir()
    monkeypatch.setattr(jobs, "SECONDS_TO_LEAVE", 0)
    with jobs.locked(folder.out), pytest.raises(ValueError, match="is in use by another call"):  # noqa: SIM117
        with jobs.locked(folder.out):
            pass
    monkeypatch.setattr(jobs.fcntl, "flock", lambda *_: shutil.rmtree(folder.out))  # its holder failed at once
    with pytest.raises(ValueError, match="was removed by the call that held it; start again"), jobs.locked(folder.out):
        pass
