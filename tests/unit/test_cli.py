"""Flags from a dataclass, their order of precedence, and one line for what a user got wrong."""

import dataclasses
import json
import re
from pathlib import Path
from typing import ClassVar

import pytest

from kd_core import cli
from kd_core.teachers.flags import DistillFlags
from kd_core.training.flags import TrainFlags


@dataclasses.dataclass(frozen=True)
class Config(DistillFlags, TrainFlags):
    """A recipe's flags."""

    student: str = "base"
    """The student."""
    steps: int = 100


def test_typed_flags_win_over_the_preset_and_the_preset_over_defaults() -> None:
    preset = """
        --steps 7 --student tiny   # a comment
        --teachers a b --kd-ratio 0.5
    """
    cfg = cli.parse(Config, ["--steps", "9", "--kd_ratio=0.25", "--local_rank=1", "--local-rank"], preset)
    assert (cfg.steps, cfg.student, cfg.teachers, cfg.kd_ratio) == (9, "tiny", ("a", "b"), 0.25)
    assert cli.parse(Config, []).steps == 100


def test_a_pattern_of_teachers_is_what_it_matches(tmp_path: Path) -> None:
    for name in ("b/hf", "a/hf"):
        (tmp_path / name).mkdir(parents=True)
    cfg = cli.parse(Config, ["--teachers", "hub/name", f"{tmp_path}/*"])
    assert cfg.teachers == ("hub/name", f"{tmp_path}/a", f"{tmp_path}/b")
    with pytest.raises(FileNotFoundError, match="matches nothing"):
        cli.parse(Config, ["--teachers", f"{tmp_path}/c*"])


def test_patterns_leave_out_caches_and_runs_that_have_not_finished(tmp_path: Path) -> None:
    for name in ("1/hf/a", "2/hf/a", "3", "own/hf/a", "hf[1]", "empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("1", "2", "3", "own"):
        (tmp_path / name / "run.json").write_text("{}")

    def teachers(pattern: str, *words: object) -> list[str]:
        cfg = cli.parse(Config, ["--out", f"{tmp_path}/own", "--teachers", pattern, *map(str, words)])
        return [str(Path(path).relative_to(tmp_path)) for path in cfg.teachers]

    assert teachers(f"{tmp_path}/*", "--draws", 2, "--kd-ratio", 1) == ["1", "2"]
    assert teachers(f"{tmp_path}/*/hf", "--sampler", "weighted", "--teacher-weights", 1, 2) == ["1/hf", "2/hf"]
    assert teachers(f"{tmp_path}/hf[1]") == ["hf[1]"]
    with pytest.raises(FileNotFoundError, match="matches nothing that has finished"):
        teachers(f"{tmp_path}/3*")
    with pytest.raises(ValueError, match="patterns are for models; name each cache"):
        teachers(f"cache:{tmp_path}/*")


def test_load_starts_from_a_saved_run_and_typed_flags_win(tmp_path: Path) -> None:
    saved = cli.parse(Config, ["--steps", "5", "--teachers", "a", "--out", str(tmp_path)])
    (tmp_path / "run.json").write_text(json.dumps({"config": dataclasses.asdict(saved)}))
    loaded = cli.parse(Config, ["--load", str(tmp_path / "run.json"), "--seed", "3"], preset="--steps 8")
    assert loaded == dataclasses.replace(saved, seed=3, out=None)
    resumed = cli.parse(Config, ["--resume", "--out", str(tmp_path)], preset="--steps 8")
    assert resumed == dataclasses.replace(saved, resume=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kd-ratoi 1", "unknown flag --kd-ratoi; did you mean --kd-ratio?"),
        ("--kd-ratio x", "--kd-ratio: could not convert string to float: 'x'"),
        ("--kd-ratio 2 --teachers a", "--kd-ratio must be in [0, 1], got 2.0"),
        ("--kd-ratio 0.5", "--kd-ratio must be 0 without --teachers"),
        ("--kd-start 0.5 --kd-stop 0.2", "--kd-stop must be at least --kd-start, 0.5, got 0.2"),
        ("--kd-stop 1.5", "--kd-stop must be in [0, 1], got 1.5"),
        ("--temperature 0", "--temperature must be a finite number above 0, got 0.0"),
        ("--temperature nan", "--temperature must be a finite number above 0, got nan"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--sampler best", "invalid choice 'best' for argument '--sampler'"),
        ("stray", "stray"),
        ("--load nowhere.json", "--load nowhere.json does not exist"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, cli.one_line_errors():
        cli.parse(Config, words.split())
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_what_was_begun_is_undone_on_an_error_only(tmp_path: Path) -> None:
    undone: list[str] = []
    with pytest.raises(SystemExit), cli.one_line_errors() as undo:
        undo.callback(undone.append, "failed")
        raise FileNotFoundError("--data is missing")
    with cli.one_line_errors() as undo:
        undo.callback(undone.append, "succeeded")
    assert undone == ["failed"]


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError), cli.one_line_errors():
        raise AssertionError("only we can break this")


@dataclasses.dataclass(frozen=True)
class WithPresets(Config):
    PRESETS: ClassVar[dict[str, cli.Preset]] = {
        "short": cli.Preset("in no time", steps=7, seed=3, compile=True),
        "other": cli.Preset("half", lr=0.5),
    }
    own: int = 3
    """What this one
    adds."""


def test_a_typed_preset_goes_over_the_launch_file_whose_own_goes_under_it(tmp_path: Path) -> None:
    in_file = "--steps 5 --teachers a b --no-compile --seed=9 --lr 0.25"
    cfg = cli.parse(WithPresets, ["--preset", "short", "--seed", "4"], preset=in_file)
    assert (cfg.steps, cfg.seed, cfg.lr, cfg.teachers, cfg.compile) == (7, 4, 0.25, ("a", "b"), True)
    cfg = cli.parse(WithPresets, ["--preset", "other"], preset=f"--preset short {in_file}")
    assert (cfg.steps, cfg.seed, cfg.lr, cfg.teachers, cfg.compile) == (5, 9, 0.5, ("a", "b"), False)
    cfg = cli.parse(WithPresets, ["--seed", "4"], preset="--preset short --steps 8 --lr 0.25")
    assert (cfg.steps, cfg.seed, cfg.lr) == (8, 4, 0.25)
    (tmp_path / "run.json").write_text(json.dumps({"config": dataclasses.asdict(cfg)}))
    loaded = cli.parse(WithPresets, ["--load", str(tmp_path / "run.json"), "--preset", "short"])
    assert (loaded.steps, loaded.seed, loaded.lr) == (7, 3, 0.25)
    with pytest.raises(ValueError, match=r"--preset must be one of \['other', 'short'\], got long"):
        cli.parse(WithPresets, ["--preset", "long"])


def test_help_has_every_flag_once_under_the_class_that_declares_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.parse(WithPresets, ["--seed", "4", "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "--preset short: in no time" in told and "--load RUN_JSON" in told
    _, *parts = re.split(r"^\W*(\w+) options\b", told, flags=re.MULTILINE)  # the boxes' lines depend on the terminal
    boxes = dict(zip(parts[::2], parts[1::2], strict=True))
    flags = [flag for box in boxes.values() for flag in re.findall(r"^\W{1,3}(--[a-z][\w-]+)", box, re.MULTILINE)]
    assert sorted(flags) == sorted("--" + field.name.replace("_", "-") for field in dataclasses.fields(WithPresets))
    assert "--max-minutes" in boxes["run"] and "--lr" in boxes["engine"] and "--sampler" in boxes["teachers"]
    assert re.search(r"--own INT +What this one adds\. \(default: 3\)", boxes["recipe"])


def test_the_shell_can_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(WithPresets, ["--tyro-print-completion", "bash"])
    assert not end.value.code and "--max-minutes" in capsys.readouterr().out
