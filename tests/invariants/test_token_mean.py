"""The gradient of 2 ranks x 2 ragged micro-batches equals one process's, on every ZeRO stage."""

import json
from pathlib import Path

from tests import warm


def test_ragged_gradient_equals_single_process_on_every_stage() -> None:
    done = warm.ranks(2, [Path(__file__).with_name("token_mean_worker.py")])
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ERRORS "))
    errors = json.loads(line.removeprefix("ERRORS "))
    assert sorted(errors) == ["0", "1", "2", "3"]
    for stage, (weights, norm) in errors.items():
        assert weights < 1e-6, f"stage {stage}: weights are off by {weights}"
        assert norm < 1e-5, f"stage {stage}: gradient norm is off by {norm}"
