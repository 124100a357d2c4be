#!/usr/bin/env bash
# The main job in small: a teacher, then the same student with it and alone, two lengths and two seeds, then what it was worth.
# About five minutes on two CPU cores once it is set up. Flags go to all of its runs, for example: --data my_texts
set -euo pipefail
here=$(dirname "$0")
out=runs/quickstart/$(date +%Y%m%d-%H%M%S)
mkdir -p runs/quickstart
bash "$here/env.sh" python3 - "$here/quickstart.json" "$out.json" "$@" <<'END'
import json, shlex, sys

study = json.load(open(sys.argv[1]))
study["flags"] += " " + shlex.join(sys.argv[3:])
json.dump(study, open(sys.argv[2], "w"), indent=2)
END
bash "$here/study.sh" "$out.json" --out "$out" --jobs "${JOBS:-2}"
echo "loss against seconds: $out/report/taught/quality.png"
