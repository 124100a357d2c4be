"""Files that are as they were written, or refused by name; folders of the cache that are, or are built anew."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from kd_core.system import checked, files
from kd_core.system.checked import DamagedError
from kd_core.training import checkpoints
from tests.recipes.test_bad_input import Harmful


def test_sealed_json_is_read_as_it_was_written_and_refused_otherwise(tmp_path: Path) -> None:
    file, content = tmp_path / "x.json", {"a": (1, 2.5), "b": {"10": "ü", "9": None}}
    text = json.dumps(checked.sealed(content), indent=1)
    file.write_text(text)
    assert checked.read_json(file, a=list, b=dict) == {"a": [1, 2.5], "b": {"10": "ü", "9": None}}
    assert checked.sealed(json.loads(text)) == json.loads(text), "sealed again it is the same"
    file.write_text(text.replace("2.5", "2.6"))
    with pytest.raises(
        DamagedError, match=r"x\.json is damaged \(its entries are not those.*remove its entry \"seal\""
    ):
        checked.read_json(file)
    file.write_text(json.dumps(content))
    assert checked.read_json(file)["a"] == [1, 2.5], "without a seal it is taken as it is"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"\0\0", "no JSON"),
        (b"[]", "list in place of an object"),
        (b"null", "NoneType in place"),
        (b"\xff", "no JSON: 'utf-8'"),
        (b"[" * 100_000, "no JSON: maximum recursion"),
        (b"{}", "it lacks world_size"),
        (b'{"world_size": "2"}', "its world_size is no int"),
    ],
)
def test_what_is_no_such_object_is_named(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DamagedError) as error:
        checked.read_json(tmp_path / "x.json", world_size=int)
    assert str(error.value).startswith(f"{tmp_path}/x.json is damaged ({why}") and "\n" not in str(error.value)


def test_a_bad_line_is_named_and_a_last_one_without_its_end_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert checked.read_lines(file) == [{"step": 1}, {"step": 2}]
    assert checked.read_lines(file, last=True) == [{"step": 2}]
    for bad, why in ((b"\0\0\0\0", "no JSON"), (b"", "empty"), (b"3", "int in place of an object")):
        file.write_bytes(b'{"step": 1}\n' + bad + b"\n")
        for last in (False, True):
            with pytest.raises(DamagedError, match=rf"metrics\.jsonl is damaged \(line 2: {why}"):
                checked.read_lines(file, last=last)


def test_digests_tell_every_byte_and_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "BLOCK", 4)
    whole = {name: os.urandom(size) for name, size in (("a", 0), ("b", 3), ("c", 4), ("d", 9))}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    sums = checked.digests(tmp_path, whole)
    assert list(sums) == list(whole) and len(set(sums.values())) == 4
    checked.check(tmp_path, sums)
    for place in range(9):
        (tmp_path / "d").write_bytes(bytes(byte ^ (at == place) for at, byte in enumerate(whole["d"])))
        with pytest.raises(DamagedError, match="d is damaged"):
            checked.check(tmp_path, sums)
    (tmp_path / "d").write_bytes(whole["d"])
    (tmp_path / "a").write_bytes(b"\0")
    with pytest.raises(DamagedError, match="a is damaged"):
        checked.check(tmp_path, sums)
    (tmp_path / "a").unlink()
    with pytest.raises(DamagedError, match=r"a is damaged \(it is gone"):
        checked.check(tmp_path, sums)


# --- folders of the cache ---------------------------------------------------------------------------------------------


def build(new: Path) -> None:
    (new / "rows.bin").write_bytes(b"rows")
    (new / "facts.json").write_text("{}")


@pytest.mark.parametrize("damage", ["rows.bin", "facts.json", files.DIGESTS, "delete", "another's", "before digests"])
def test_a_damaged_folder_of_the_cache_is_built_anew_saying_so(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "_SOUND", set())
    folder, other = tmp_path / "corpus-1", tmp_path / "corpus-2"
    for one in (folder, other):
        files.build_once(one, build)
    assert not capsys.readouterr().err
    (folder / "later.bin").write_bytes(b"a shard that came later")
    match damage:
        case "delete":
            (folder / "rows.bin").unlink()
        case "another's":
            for file in other.iterdir():
                file.rename(folder / file.name)
        case "before digests":
            (folder / files.DIGESTS).unlink()
        case name:
            (folder / name).write_bytes(b"rowz")
    files.build_once(folder, pytest.fail)  # this process has looked already
    files._SOUND.clear()
    files.build_once(folder, build)
    said = capsys.readouterr().err
    named = {"delete": "rows.bin", "another's": files.DIGESTS, "before digests": files.DIGESTS}.get(damage, damage)
    assert said.count("\n") == 1 and f"{folder / named}" in said and f"building {folder} anew" in said
    assert (folder / "rows.bin").read_bytes() == b"rows" and (folder / "later.bin").exists()
    files._SOUND.clear()
    files.build_once(folder, pytest.fail)


def test_only_local_rank_0_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SOUND", set())
    files.build_once(tmp_path / "x", build)
    files._SOUND.clear()
    (tmp_path / "x" / "rows.bin").write_bytes(b"rowz")
    monkeypatch.setenv("LOCAL_RANK", "1")
    files.build_once(tmp_path / "x", pytest.fail)  # rank 0, which the others wait for, has looked


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose file would make another file when it is read, and that one."""
    checkpoint, mark = tmp_path / "step00000003", tmp_path / "was_run"
    checkpoint.mkdir()
    torch.save({"module": Harmful(str(mark))}, checkpoint / "mp_rank_00_model_states.pt")
    checkpoints._write_manifest(checkpoint)
    return checkpoint, mark


def test_a_foreign_checkpoint_is_refused_by_name_and_runs_nothing(foreign: tuple[Path, Path]) -> None:
    checkpoint, mark = foreign
    for read in (checkpoints.read_state, checkpoints.read_checkpoint):
        with pytest.raises(DamagedError, match=r"mp_rank_00_model_states\.pt is damaged \(it asks for \w+\.open"):
            read(checkpoint)
    next(checkpoint.glob("*.pt")).unlink()
    (checkpoint / "state.pt").write_bytes(b"\x80\x04c")
    with pytest.raises(DamagedError, match=r"state\.pt is damaged \(none of PyTorch's"):
        checkpoints.read_state(checkpoint)
    assert not mark.exists()


@pytest.mark.parametrize("user_has", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
def test_whoever_loads_within_restricted_gets_no_code(
    foreign: tuple[Path, Path], user_has: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSpeed does, which asks for everything; what names the file is not what refuses."""
    checkpoint, mark = foreign
    monkeypatch.setattr(checkpoints, "_refuse_code", lambda file: None)
    if user_has:
        monkeypatch.setenv(user_has, "1")
    before = dict(os.environ)
    with pytest.raises(DamagedError, match="step00000003 is damaged"), checkpoints.restricted(checkpoint):
        torch.load(next(checkpoint.glob("*.pt")), weights_only=False)
    assert not mark.exists()
    assert dict(os.environ) == before
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.load(next(checkpoint.glob("*.pt")), weights_only=False)
    assert mark.exists(), "or the test could not fail"


class Asked:
    """What pickle writes as a call of getattr, as Python before 3.11.4 does for a member of an enum."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, self.arguments


@pytest.mark.parametrize(
    "arguments", [(ZeroStageEnum, "__class__"), (ZeroStageEnum, "nowhere"), (LossScaler, "__init__")]
)
def test_getattr_gives_a_stage_of_zero_and_nothing_else(arguments: tuple[object, str], tmp_path: Path) -> None:
    file = tmp_path / "states.pt"
    torch.save({"stage": Asked(ZeroStageEnum, "gradients")}, file)
    with checkpoints.restricted(tmp_path):
        assert torch.load(file)["stage"] is ZeroStageEnum.gradients
    torch.save({"stage": Asked(*arguments)}, file)
    with pytest.raises(DamagedError), checkpoints.restricted(tmp_path):
        torch.load(file)


@pytest.mark.parametrize("manifest", ["{}", "[]", "", "\0", '{"other.pt": "0"}'])
def test_a_manifest_that_says_nothing_is_no_sound_one(manifest: str, foreign: tuple[Path, Path]) -> None:
    checkpoint, _ = foreign
    assert checkpoints._damage(checkpoint) == ""
    (checkpoint / "manifest.json").write_text(manifest)
    assert "manifest.json" in checkpoints._damage(checkpoint)


def test_a_file_that_the_manifest_does_not_name_is_not_read(foreign: tuple[Path, Path]) -> None:
    checkpoint, _ = foreign
    torch.save({}, checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert "nothing of zero_pp_rank_0" in checkpoints._damage(checkpoint)


def test_an_empty_checkpoint_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert checkpoints._damage(tmp_path) == "it is empty"


def test_the_manifest_holds_for_any_key(foreign: tuple[Path, Path]) -> None:
    checkpoint, _ = foreign
    sums: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**sums, "gone.pt": "0" * 64}))
    assert "gone.pt" in checkpoints._damage(checkpoint)
