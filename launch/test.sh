#!/usr/bin/env bash
# Everything that needs no GPU: ./launch/test.sh [flags of pytest]. On a fresh clone it sets itself up first.
# Tests marked slow run with: ./launch/test.sh -m slow
set -uo pipefail
cd -- "$(dirname -- "$0")/.." || exit
exec </dev/null
export KD_DEV=1 CI=true
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests start two ranks at once, on two cores

bash launch/env.sh || exit
status=0
for tool in "ruff check" "ruff format --check" mypy; do
    # shellcheck disable=SC2086  # words on purpose
    bash launch/env.sh python3 -m $tool || status=1
done
bash launch/env.sh python3 -m pytest -q -m "not slow" "$@" || status=1 # the last -m wins
exit $status
