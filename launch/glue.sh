#!/usr/bin/env bash
# What pretrained models are worth on GLUE (recipes/glue.py): bash launch/glue.sh RUN_OR_MODEL... [flags]
# All GPUs, or without a GPU all cores, take a job each; --help lists the flags. The same call with --out DIR continues.
set -euo pipefail
here=$(dirname "$0")
exec bash "$here/env.sh" python3 "$here/../recipes/glue.py" "$@"
