"""A run that was stopped before the house was rebuilt (commit 8384510) goes on after it, to the bit."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT, cpu_environment
from tests.recipes.conftest import SMALL, metrics, start, trace, wait_for_step

BEFORE = "8384510"
RESNET = (
    "--preset cifar --data synthetic:10x32 --steps 8 --global-batch-size 64 --micro-batch-size 32 --ema-half-life 2 "
    "--log-every 1 --eval-every 4 --save-every 3"
).split()


@pytest.fixture(scope="session")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it was."""
    folder = tmp_path_factory.mktemp("before")
    archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"no commit {BEFORE} here (not a git checkout, or a shallow one)")
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


@pytest.mark.parametrize("recipe", ["bert_kd", pytest.param("resnet_kd", marks=pytest.mark.slow)])
def test_a_run_of_before_resumes_but_for_rounding(
    recipe: str, before: Path, corpus_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = RESNET if recipe == "resnet_kd" else [*SMALL, "--data", str(corpus_file)]

    def command(home: Path, *words: object) -> list[str]:
        monkeypatch.setenv("PYTHONPATH", str(home))
        return [sys.executable, str(home / "recipes" / f"{recipe}.py"), *map(str, words)]

    def run(words: list[str]) -> None:
        env = cpu_environment(KD_CACHE=str(cache))
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]

    run(command(before, *flags, "--seed", 3, "--out", tmp_path / "teacher"))
    distil = ["--teachers", tmp_path / "teacher", "--kd-ratio", 0.5, "--kd-stop", 0.75]
    run(command(before, *flags, *distil, "--out", tmp_path / "whole"))
    killed = tmp_path / "killed"
    process = start(cache, *command(before, *flags, *distil, "--out", killed))
    wait_for_step(killed, 5, process)
    process.kill()
    process.wait()
    assert "step00000003" in {path.name for path in (killed / "checkpoints").iterdir()}
    run(command(ROOT, "--out", killed, "--resume"))
    assert len(metrics(killed)) == 8
    for ours, theirs in zip(trace(killed), trace(tmp_path / "whole"), strict=True):  # kernels may round otherwise since
        assert [pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for value in theirs] == list(ours)
    one, other = (load_file(folder / "hf" / "model.safetensors") for folder in (killed, tmp_path / "whole"))
    assert one.keys() == other.keys()
    assert all((one[name] - other[name]).abs().max() < 1e-4 for name in one)
