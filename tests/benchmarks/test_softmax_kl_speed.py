"""softmax_kl is leaner than the losses composed from PyTorch functions. Figures: python -m kd_core.kernels.bench."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kd_core.kernels import bench, bench_measure
from kd_core.kernels.bench_measure import Case

CASE = Case(512, 30522, "float32", 1.0, labels=True, threads=1)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("provider", ["softmax_kl", "softmax_kl_sum", "softmax_kl, no C compiler"])
def test_a_tenth_of_the_memory(provider: str) -> None:
    ours, theirs = (bench_measure.cpu_peak_bytes(name, CASE) for name in (provider, "eager"))
    # At the very least the eager form keeps both log-softmaxes: a smaller figure would mean that nothing was measured.
    assert theirs > 2 * 512 * 30522 * 4
    assert ours <= theirs / 10, f"{ours / 2**20:.1f} MiB against {theirs / 2**20:.1f} MiB"


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "run_tests", lambda: "all passed")  # this is one of them
    monkeypatch.setattr(bench, "report_first_calls", lambda *_: {})
    words = "--device cpu --rows 16 --columns 100 200 --dtypes float32 --temperatures 2 --labels on --rounds 2"
    bench.main([*words.split(), "--out", str(tmp_path)])
    cases = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [case["columns"] for case in cases] == [100, 200]
    for case in cases:
        assert {"eager", "torch.compile", "softmax_kl", "softmax_kl_sum"} <= set(case["providers"])
        assert not bench.wrong(case)
    shown, table = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    assert table in shown and "| 16 x 200 | float32 | 2 | on | 1 | softmax_kl_sum |" in table
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    bad = cases[0] | {"providers": {"softmax_kl": cases[0]["providers"]["softmax_kl"] | {"gradient_error": 0.1}}}
    assert bench.wrong(bad) == ["softmax_kl"]
