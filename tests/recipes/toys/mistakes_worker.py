"""Makes every mistake of two_networks.py on one ZeRO stage in one process: python mistakes_worker.py CONFIG FOLDER MISTAKE...

Prints by mistake what the loop says, and how many steps it has logged.
"""

import json
import os
import sys
from pathlib import Path

from kd_core.training.engine import LoopError
from tests.recipes.toys import two_networks

STEPS = "--steps 8 --save-every 3 --eval-every 4 --log-every 1".split()
BATCH = "--global-batch-size 8 --micro-batch-size 1 --lr 1e-2 --clip 1".split()

config, folder, *mistakes = sys.argv[1:]
said = {}
for mistake in mistakes:
    out = Path(folder, mistake)
    words = [*STEPS, *BATCH, "--deepspeed-config", config, "--out", str(out), "--mistake", mistake]
    try:
        said[mistake] = [f"exit code {two_networks.main(words)}", 0]
    except LoopError as error:
        said[mistake] = [str(error), len((out / "metrics.jsonl").read_text().splitlines())]
print(json.dumps(said), flush=True)
os._exit(0)
