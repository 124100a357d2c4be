#!/usr/bin/env bash
# The main job in small: a teacher, then the same student with and without it, then what that was worth.
# About ten minutes on two CPU cores. Flags go to both student runs, for example: --data my_texts --steps 500
set -euo pipefail
here=$(dirname "$0")
out=runs/quickstart/$(date +%Y%m%d-%H%M%S)
export NUM_GPUS=${NUM_GPUS:-1}
for arm in kd baseline; do
    bash "$here/bert_$arm.sh" --preset small "$@" --out "$out/$arm"
    [ -d "$out/$arm/hf" ] || exit 1 # stopped by a signal
done
exec bash "$here/env.sh" python3 -m kd_core.time_to_quality "$out/baseline" --against "$out/kd" --out "$out/report"
