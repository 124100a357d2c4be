#!/usr/bin/env bash
# The twin of launch/causal_lm_kd.sh without a teacher: the same file, flags and forms, with --kd-ratio 0 over all of them.
#
# To a shell the next line is a command that sets up, starts DeepSpeed on this file and never returns; to Python it is
# an unused string.
"eval" 'exec bash "$(dirname "$0")/env.sh" python3 -m kd_core.launch "$0" "$@"'  # fmt: skip

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv += ["--kd-ratio", "0"]
    runpy.run_path(str(Path(__file__).with_name("causal_lm_kd.sh")), run_name="__main__")
