#!/usr/bin/env bash
# The data of the methods' studies, into runs/data/; each is left out where its variable is not set:
#     CIFAR10=cifar10 CIFAR100=cifar100 WIKI=wikipedia_en GSM8K=gsm8k bash recipes/results/methods/prepare.sh
# CIFAR10 and CIFAR100 are folders with train.parquet and test.parquet, WIKI one with train.jsonl.xz and validation.jsonl.xz, GSM8K one
# with train.jsonl.gz, of which a fiftieth is held out. Settings are tuned on NAME_tuning: on a tenth of the training images,
# or a fiftieth of the training texts, held out there; what is held out otherwise is not read.
set -euo pipefail
cd "$(dirname "$0")/../../.."

data() { # NAME FOLDER
    mkdir -p "runs/data/$1_tuning"
    ln -sfn "$(realpath "$2")" "runs/data/$1"
    python - "$2/train.parquet" "runs/data/$1_tuning" <<'END'
import sys

import numpy as np
import pyarrow.parquet as pq

images = pq.read_table(sys.argv[1])
order, held_out = np.random.default_rng(0).permutation(len(images)), len(images) // 10
for split, rows in (("train", order[held_out:]), ("validation", order[:held_out])):
    pq.write_table(images.take(np.sort(rows)), f"{sys.argv[2]}/{split}.parquet")
END
}
[ -z "${CIFAR10:-}" ] || data cifar10 "$CIFAR10"
[ -z "${CIFAR100:-}" ] || data cifar100 "$CIFAR100"
if [ -n "${WIKI:-}" ]; then
    mkdir -p runs/data/wikipedia_tuning
    ln -sfn "$(realpath "$WIKI")" runs/data/wikipedia
    ln -sfn "$(realpath "$WIKI/train.jsonl.xz")" runs/data/wikipedia_tuning/train.jsonl.xz
fi
if [ -n "${GSM8K:-}" ]; then
    mkdir -p runs/data
    ln -sfn "$(realpath "$GSM8K")" runs/data/gsm8k
fi
