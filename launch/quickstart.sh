#!/usr/bin/env bash
# The main job in small: a teacher, then the same student with it and alone, two lengths and two seeds, then what it was worth.
# About five minutes on two CPU cores once it is set up. Flags go to all of its runs, for example: --data my_texts
set -euo pipefail
here=$(dirname "$0")
out=runs/quickstart/$(date +%Y%m%d-%H%M%S)
mkdir -p runs/quickstart
bash "$here/env.sh" python3 - "$here/quickstart.json" "$out.json" "$@" <<'END'
import json, shlex, sys
from pathlib import Path

from kd_core.cli import one_line_errors
from kd_core.system.checked import read_json

with one_line_errors():
    study = read_json(Path(sys.argv[1]), flags=str)
    study["flags"] += " " + shlex.join(sys.argv[3:])
    Path(sys.argv[2]).write_text(json.dumps(study, indent=2))
END
bash "$here/study.sh" "$out.json" --out "$out" --jobs "${JOBS:-2}"
echo "loss against seconds: $out/report/taught/quality.png"
