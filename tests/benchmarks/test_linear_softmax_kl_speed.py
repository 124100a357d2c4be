"""linear_softmax_kl is leaner than heads and losses composed from PyTorch functions. Figures: ./launch/bench.sh linear."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kd_core.kernels import bench_linear, bench_measure
from kd_core.kernels.bench_linear import OURS, Case

CASE = Case(1024, 256, 512, 30522, "float32", 2.0, labels=True, threads=1)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(CASE.threads)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("rows", [1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_a_tenth_of_the_memory(rows: int) -> None:
    case = CASE._replace(rows=rows)
    ours, theirs = (bench_measure.in_a_new_process(bench_linear.cpu_peak_bytes, name, case) for name in (OURS, "eager"))
    # The eager form keeps both sides' logits and log-softmaxes at the very least.
    assert theirs > 4 * rows * case.columns * 4
    gradients = 4 * case.student_width * (rows + case.columns)
    assert ours - gradients <= (theirs - gradients) / 10, f"{ours / 2**20:.1f} MiB against {theirs / 2**20:.1f} MiB"


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--device cpu --tokens 40 --shapes 8,12,300 --labels on --rounds 2 --out {tmp_path}"
    bench_linear.main(words.split())
    cases = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [case["rows"] for case in cases] == [40]
    for case in cases:
        assert {"eager", "torch.compile", OURS, "matmuls alone"} <= set(case["providers"])
        assert max(case["providers"][OURS][f"{name}_error"] for name in ("value", "hidden", "weight")) < 1e-6
    assert "| 40 x (8, 12, 300) | float32 | 2 | on | 1 | linear_softmax_kl |" in capsys.readouterr().out
