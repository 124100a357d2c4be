#!/usr/bin/env bash
# A matched study, resumable, and its time-to-quality reports: bash launch/study.sh launch/example_study.json
# What a study file holds stands at the top of kd_core/study.py. --out DIR names its folder, --jobs N the runs at a time.
set -euo pipefail
here=$(dirname "$0")
exec bash "$here/env.sh" python3 -m kd_core.study "$@"
