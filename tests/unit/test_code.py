"""Which code made a run, which runs stand in one report, and the check that joins those of two commits."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kd_core import study
from kd_core.runs import code, lean
from kd_core.runs.design import read_study
from tests.conftest import ROOT
from tests.invariants.test_structure import CORE, RECIPES, imported, module


def test_the_digest_is_of_what_computes(tmp_path: Path) -> None:
    core, recipe = tmp_path / "kd_core", tmp_path / "recipe.py"
    for name in (
        "loop.py",
        "study.py",
        "README.md",
        "time_to_quality/curves.py",
        "kernels/bench.py",
        "kernels/softmax_kl.c",
    ):
        (core / name).parent.mkdir(parents=True, exist_ok=True)
        (core / name).write_text("1")
    recipe.write_text("1")

    def changed(file: Path) -> list[str]:
        code._of_core.cache_clear()
        before = code.digests(recipe, core)
        file.write_text("2")
        code._of_core.cache_clear()
        now = code.digests(recipe, core)
        return [part for part in now if now[part] != before[part]]

    assert changed(recipe) == ["recipe"]
    assert changed(core / "loop.py") == changed(core / "kernels/softmax_kl.c") == ["kd_core"]
    for name in ("study.py", "README.md", "time_to_quality/curves.py", "kernels/bench.py"):
        assert changed(core / name) == []


def test_no_run_computes_by_what_the_digest_leaves_out() -> None:
    files = {module(path): path for path in CORE.rglob("*.py")}
    used: set[str] = set()
    waiting = [path for path in RECIPES if path.stem != "glue"]
    while waiting:
        new = set(imported(waiting.pop(), set(files))) - used
        used |= new
        waiting += [files[name] for name in new]
    names = {str(files[name].relative_to(CORE)) for name in used}
    assert "training/loop.py" in names
    assert {name for name in names if name in code.READERS or name.split("/")[0] in code.READERS} <= {"runs/code.py"}
    assert not [name for name in names if "/bench" in name]


NEW, OTHER = {"kd_core": "aa", "recipe": "bb"}, {"kd_core": "cc", "recipe": "bb"}


def run(made_by: dict[str, str] | None = None, commit: str = "1" * 40, recipe: str = "bert_kd") -> dict[str, Any]:
    return {"recipe": recipe, "commit": commit} | ({"code": made_by} if made_by else {})


def test_runs_of_one_code_say_nothing_whatever_their_commits() -> None:
    assert code.mixed({"a": run(NEW), "b": run(NEW, "2" * 40)}) == []
    assert code.mixed({"a": run(), "b": run()}) == code.mixed({}) == []
    assert (
        code.mixed({"a": run(NEW), "b": run(NEW | {"recipe": "x"}, recipe="dkd")}) == []
    )  # each recipe has its own file


def test_older_runs_of_several_commits_are_told_with_a_note_unless_they_were_checked() -> None:
    runs = {"a": run(), "b": run(commit="2" * 40), "c": run(commit="3" * 40)}
    assert code.mixed(runs) == ["Runs of 3 commits are mixed, and were not checked to compute the same."]
    assert code.mixed(runs, [["1" * 40, "2" * 40, "x"]]) == [
        "Runs of 2 commits are mixed, and were not checked to compute the same."
    ]
    assert code.mixed(runs, [["1" * 40, "aa", "x"], ["3" * 40, "2" * 40, "aa", "y"]]) == []


@pytest.mark.parametrize("other", [run(OTHER, "2" * 40), run(NEW | {"recipe": "dd"}), run(commit="2" * 40), run()])
def test_a_run_is_not_told_with_those_of_other_code_or_of_unknown_code(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"were made by code that differs in .*--check COMMIT"):
        code.mixed({"a": run(NEW), "b": other})


def test_a_check_joins_them_but_the_digest_of_losses_is_no_name() -> None:
    runs = {"a": run(NEW), "b": run(OTHER), "c": run(commit="2" * 40)}
    assert code.mixed(runs, [["3" * 40, "cc", "bb", "aa", "x"], ["2" * 40, "aa", "bb", "y"]]) == []
    with pytest.raises(ValueError, match="differs in kd_core"):
        code.mixed({"a": run(NEW), "b": run(OTHER)}, [["aa", "zz", "cc"]])


def test_a_run_that_went_on_by_other_code_is_like_no_other() -> None:
    assert code.resumed(run(NEW), NEW) == NEW
    assert code.resumed(run(NEW), OTHER) == {"kd_core": "aa, then cc", "recipe": "bb"}
    assert code.resumed(run(), NEW)["kd_core"] == f"{'1' * 40}, then aa"


# A project whose recipe's losses follow from a file of its kd_core. Run, it knows nothing of this project.
TOY = """
import sys
if __name__ != "__main__":
    import dataclasses
    from kd_core.training.flags import TrainFlags
    @dataclasses.dataclass(frozen=True)
    class Config(TrainFlags):
        pass
else:
    import json, pathlib
    words = {name: value for name, value in zip(sys.argv[1::2], sys.argv[2::2])}
    out, factor = pathlib.Path(words["--out"]), float(pathlib.Path(__file__).parents[1].joinpath("kd_core/factor.py").read_text())
    out.mkdir(parents=True)
    lines = [{"step": step, "loss": factor * step + float(words["--lr"]), "train_s": 1.0} for step in range(1, int(words["--steps"]) + 1)]
    lines[-1]["eval/loss"] = factor
    out.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    out.joinpath("run.json").write_text(json.dumps({"recipe": "toy", "config": {}, "world_size": 1, "result": lines[-1]}))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    for name in ("kd_core", "recipes"):
        (root / name).mkdir(parents=True)
    (root / "kd_core/factor.py").write_text("2.0")
    (root / "recipes/toy.py").write_text(TOY)
    design = {
        "recipe": "recipes/toy.py",
        "arms": {"a": "", "b": "--lr 2"},
        "baseline": "a",
        "lengths": [30],
        "seeds": [1, 2],
    }
    (root / "study.json").write_text(json.dumps(design | {"flags": "--lr 1"}))
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.chdir(root)
    monkeypatch.setattr(study, "ROOT", root)
    code._of_core.cache_clear()
    return root


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["study", "study.json", "--out", "out", *words])
    study.main()


def test_a_check_runs_every_arm_by_both_and_names_them_in_the_study(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    before = code.digests(project / "recipes/toy.py", project / "kd_core")
    (project / "kd_core/factor.py").write_text("2.00")
    code._of_core.cache_clear()
    now = code.digests(project / "recipes/toy.py", project / "kd_core")
    assert before != now
    command(monkeypatch, "--check", head[:7])
    (entry,) = read_study(project / "study.json").same_code
    assert entry[:-1] == [head, *dict.fromkeys([*before.values(), *now.values()])]
    assert code.mixed({"a": run(before), "b": run(now), "c": run(commit=head)}, [entry]) == []
    assert list(project.glob(".git/worktrees/*")) == []


def test_losses_that_differ_are_one_line_and_change_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "kd_core/factor.py").write_text("2.0000000001")
    before = (project / "study.json").read_text()
    for commit, told in (("HEAD", 'arm "a": step 1 has .* there and .* here'), ("no-such", "--check no-such: ")):
        with pytest.raises(SystemExit) as end:
            command(monkeypatch, "--check", commit)
        assert end.value.code == 2 and re.search(told, capsys.readouterr().err)
    assert (project / "study.json").read_text() == before


def test_no_new_run_joins_those_of_other_code(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"lr": 1.0, "seed": 1, "steps": 30}
    record = run(OTHER, recipe="toy") | {"config": config, "world_size": 1, "result": {"stopped": "finished"}}
    (project / "out").mkdir()
    (project / "out/study.json").write_text("{}")
    lean.write(project / "out", {"a/30/1": lean.Lean(record, [{"step": 30, "train_s": 1.0, "eval/loss": 1.0}])})
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "--dry-run")
    assert end.value.code == 2
    assert re.search(
        r"a/30/1 and a/30/2 were made by code that differs in kd_core|a/30/1 and b/30/1", capsys.readouterr().err
    )


def test_the_rule_is_told_where_a_user_looks() -> None:
    assert "--check COMMIT" in (study.__doc__ or "") and "--check COMMIT" in (ROOT / "launch/README.md").read_text()
