"""The C code of softmax_kl: compilers that fail, damaged caches, forks. Its numbers: the other files, variant "native"."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_core.kernels import softmax_kl_native
from kd_core.kernels.softmax_kl import softmax_kl
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(softmax_kl_native.library() is None, reason="no C compiler here")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """The C functions, looked for in a cache of the test's own, as each new process does."""
    monkeypatch.setenv("KD_CACHE", str(tmp_path))
    monkeypatch.setattr(softmax_kl_native, "library", functools.cache(softmax_kl_native.library.__wrapped__))

    def again() -> Any:
        softmax_kl_native.library.cache_clear()
        return softmax_kl_native.library()

    return again


def is_right() -> bool:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).chunk(2)
    return torch.allclose(softmax_kl(*logits)[0], softmax_kl(*logits, impl="reference")[0], rtol=1e-5)


def test_compiled_once_and_kept(library: Callable[[], Any], tmp_path: Path) -> None:
    assert library() and is_right()
    (file,) = (tmp_path / "kernels").iterdir()
    made = file.stat().st_mtime_ns
    assert library() and is_right() and file.stat().st_mtime_ns == made
    file.unlink()  # what this process has loaded stays
    file.write_bytes(b"")  # damaged: made anew
    assert library() and is_right() and file.stat().st_size > 1000


@pytest.mark.parametrize("planted", ["another's", "writable by others", "other bytes", "a link", "another's first"])
def test_code_that_somebody_else_put_into_the_cache_does_not_run(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted.startswith("another's") and os.geteuid():
        pytest.skip("needs root, to give files away")
    monkeypatch.setenv("KD_CACHE", str(tmp_path))
    compiler = [next(name for name in softmax_kl_native.COMPILERS if shutil.which(name))]
    monkeypatch.setattr(softmax_kl_native, "FLAGS", ["-std=gnu11", "-O0", "-march=native"])
    assert softmax_kl_native._compile(compiler).softmax_kl
    (library,) = (tmp_path / "kernels").iterdir()
    source, harmful = tmp_path / "harmful.c", tmp_path / "harmful.so"
    source.write_text(
        "#include <stdio.h>\n"
        f'__attribute__((constructor)) static void f(void) {{ fclose(fopen("{tmp_path}/was_run", "w")); }}\n'
    )
    subprocess.run([*compiler, "-shared", "-fPIC", source, "-o", harmful], check=True)
    harmful.chmod(0o777 if planted in ("writable by others", "a link") else 0o755)
    digest = softmax_kl_native._digest(harmful.read_bytes())
    fits = library.with_name(f"{library.stem.rpartition('-')[0]}-{digest}.so")  # found, and with its own digest
    library.unlink()
    if planted == "a link":
        fits.symlink_to(harmful)
    else:
        shutil.copy(harmful, library if planted == "other bytes" else fits)
    if planted.startswith("another's"):
        os.chown(fits, 12345, 12345)
    if planted == "another's first":  # where ours would lie
        fits.rename(library)
    assert softmax_kl_native._compile(compiler).softmax_kl, "compiled anew"
    assert not (tmp_path / "was_run").exists()
    assert softmax_kl_native._load(library), "for the next time"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "cc --no-such-flag"])
def test_a_compiler_that_fails_is_named_and_pytorch_serves(
    compiler: str, library: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=f"runs in PyTorch, slower.* compiled by {compiler.split()[0]}") as told:
        assert library() is None and is_right()
    assert len(told) == 1


@pytest.mark.filterwarnings("error")
def test_without_a_compiler_pytorch_serves(
    library: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library() is None and is_right()


FORK = """
import os
import torch
from kd_core.kernels import softmax_kl_native
from kd_core.kernels.softmax_kl import softmax_kl
torch.set_num_threads(2)
logits = torch.randn(64, 5000), torch.randn(64, 5000)
assert softmax_kl_native.library()
kd, _ = softmax_kl(*logits)
child = os.fork()
again, _ = softmax_kl(*logits)
assert torch.equal(again, kd)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_fork_has_threads_of_its_own() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
