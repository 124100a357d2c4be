"""A head that gives losses trains on 2 ranks, tied, on every ZeRO stage, as in one process; at stage 3 its teacher is sharded."""

import json
from pathlib import Path

from tests import warm


def test_two_ranks_equal_one_process_on_every_stage() -> None:
    done = warm.ranks(2, [Path(__file__).with_name("linear_zero_worker.py")])
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ERRORS "))
    errors = json.loads(line.removeprefix("ERRORS "))
    assert sorted(errors) == ["0", "1", "2", "3"]
    for stage, (weights, loss) in errors.items():
        assert weights < 1e-6, f"stage {stage}: weights are off by {weights}"
        assert loss < 1e-6, f"stage {stage}: a loss is off by {loss}"
