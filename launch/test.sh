#!/usr/bin/env bash
# Everything that needs no GPU: ./launch/test.sh [flags of pytest]. On a fresh clone it sets itself up first.
# Tests marked slow run with: ./launch/test.sh -m slow. One worker a core, at most eight; -n 0 for none, as for -s or --pdb.
set -uo pipefail
cd -- "$(dirname -- "$0")/.." || exit
exec </dev/null
export KD_DEV=1 CI=true
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests start two ranks at once, on two cores

took=launch/__pycache__/seconds-of-tests # of the whole default tier; ignored by git
workers=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 1) # nproc itself looks at them
[ "$workers" -le 8 ] || workers=8
if [ $# = 0 ]; then
    told="about 15 minutes on two cores"
    [ ! -r "$took" ] || told="$(cat "$took") s the last time here"
    echo "launch/test.sh: lint, types, and all tests but those marked slow on $workers workers; $told" >&2
fi
SECONDS=0
bash launch/env.sh || exit
status=0
for tool in "ruff check" "ruff format --check" mypy; do
    # shellcheck disable=SC2086  # words on purpose
    bash launch/env.sh python3 -m $tool || status=1
done
bash launch/env.sh python3 -m pytest -q -m "not slow" -n "$workers" --dist worksteal "$@" || status=1 # the last -m wins
[ $# != 0 ] || [ $status != 0 ] || { mkdir -p launch/__pycache__ && echo $SECONDS >"$took"; }
exit $status
