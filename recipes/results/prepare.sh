#!/usr/bin/env bash
# The data and the teachers of the studies in this folder, into runs/:
#     WIKI=wikipedia_en CIFAR=cifar10 IMAGENETTE=imagenette.tar bash recipes/results/prepare.sh
#     WIKI=wikipedia_en bash recipes/results/prepare.sh teachers/good caches/good        # these alone; data: no teacher
# The same call continues what was stopped; in all it takes hours. WIKI is a folder with train.jsonl.xz and
# validation.jsonl.xz, CIFAR one with train.parquet and test.parquet.
set -euo pipefail
cd "$(dirname "$0")/../.."
names=("$@")
known=(data teachers/{good,distilled,poor,long,equal_11,equal_12,equal_13,resnet20,resnet8,resnet8_16,resnet20_16,imagenette20} \
    caches/{good,resnet20,resnet8,resnet20_16,resnet8_16})
for name in "${names[@]}"; do
    [[ " ${known[*]} " == *" $name "* ]] || { echo "error: $name is not known; name some of ${known[*]}" >&2; exit 2; }
done
[ ${#names[@]} -gt 0 ] || : "${WIKI:?} ${CIFAR:?} ${IMAGENETTE:?}"
mkdir -p runs/data

if [ -n "${WIKI:-}" ]; then # flags were chosen on one part of the validation documents, the results are those of another
    mkdir -p runs/data/wikipedia_tuning runs/data/wikipedia_report
    for part in tuning report; do
        ln -sf "$(realpath "$WIKI/train.jsonl.xz")" "runs/data/wikipedia_$part/train.jsonl.xz"
    done
    xz -dc "$WIKI/validation.jsonl.xz" | awk 'NR % 2 { print > "runs/data/wikipedia_tuning/validation.jsonl" } NR % 4 == 0 { print > "runs/data/wikipedia_report/validation.jsonl" }'
fi
if [ -n "${CIFAR:-}" ]; then
    ln -sfn "$(realpath "$CIFAR")" runs/data/cifar10
    mkdir -p runs/data/cifar10_tuning
    python - "$CIFAR/train.parquet" runs/data/cifar10_tuning <<'END'
import sys

import numpy as np
import pyarrow.parquet as pq

images = pq.read_table(sys.argv[1])
order = np.random.default_rng(0).permutation(len(images))
for split, rows in (("train", order[5000:]), ("validation", order[:5000])):
    pq.write_table(images.take(np.sort(rows)), f"{sys.argv[2]}/{split}.parquet")
END
fi
[ -z "${IMAGENETTE:-}" ] || ln -sfn "$(realpath "$IMAGENETTE")" runs/data/imagenette224.tar

wanted() { [ ${#names[@]} -eq 0 ] || [[ " ${names[*]} " == *" ${1#runs/} "* ]]; }
run() { # a recipe's command that ends in its run folder; continues what was stopped
    wanted "${*: -1}" || return 0
    [ ! -e "${*: -1}/run.json" ] || set -- "$@" --resume
    python "$@"
}
cache() { # likewise, of kd_core.cache
    wanted "${*: -1}" || return 0
    [ -e "${*: -1}/manifest.json" ] || python -m kd_core.cache build "$@"
}
bert() {
    run recipes/bert_kd.py --data runs/data/wikipedia_tuning --vocab-size 2048 --seq-len 32 --mask-fraction 0.3 --clip 1 \
        --dropout 0 --global-batch-size 64 --micro-batch-size 64 --log-every 20 --save-every 100000 "$@"
}
bert --student mini --lr 1e-3 --steps 3000 --deepspeed-config zero1_bf16.json --eval-every 150 --out runs/teachers/good
bert --student tiny --lr 2e-3 --steps 1500 --global-batch-size 32 --micro-batch-size 32 --deepspeed-config zero0_fp32_cpu.json \
    --eval-every 100 --teachers runs/teachers/good --kd-ratio 0.9 --out runs/teachers/distilled
bert --student tiny --lr 2e-3 --steps 4000 --global-batch-size 32 --micro-batch-size 32 --deepspeed-config zero0_fp32_cpu.json \
    --eval-every 200 --out runs/teachers/poor
bert --student tiny --lr 2e-3 --steps 6400 --deepspeed-config zero0_fp32_cpu.json --eval-every 100 --log-every 100 --seed 1 \
    --out runs/teachers/long
for seed in 11 12 13; do # of like quality, for bert_pool
    bert --student tiny --lr 2e-3 --steps 6400 --deepspeed-config zero0_fp32_cpu.json --eval-every 100 --log-every 100 \
        --seed $seed --out runs/teachers/equal_$seed
done
run recipes/resnet_kd.py --preset cifar --data runs/data/cifar10 --micro-batch-size 128 --student resnet20 --steps 2000 \
    --eval-every 500 --log-every 50 --out runs/teachers/resnet20
run recipes/resnet_kd.py --preset cifar --data runs/data/cifar10_tuning --micro-batch-size 128 --student resnet8 --steps 3000 \
    --eval-every 500 --log-every 50 --seed 1 --save-every 100000 --out runs/teachers/resnet8
for student in "resnet8 --steps 8000" "resnet20 --steps 3200"; do
    run recipes/resnet_kd.py --preset cifar --data runs/data/cifar10_tuning --micro-batch-size 128 --train-size 16 \
        --eval-resize 16 --eval-size 16 --student $student --lr 0.4 --eval-every 800 --log-every 50 --seed 1 \
        --save-every 100000 --out "runs/teachers/${student%% *}_16"
done
run recipes/resnet_kd.py --preset cifar --data runs/data/imagenette224.tar --crop resized --min-scale 0.25 --train-size 48 \
    --eval-resize 48 --eval-size 48 --global-batch-size 64 --micro-batch-size 64 --lr 0.1 --student resnet20 --steps 1200 \
    --eval-every 300 --log-every 50 --out runs/teachers/imagenette20

cache --teacher runs/teachers/good --data runs/data/wikipedia_report --vocab-size 2048 --seq-len 32 \
    --mask-fraction 0.3 --mask-patterns 1 --micro-batch-size 64 --out runs/caches/good
cache --kind images --preset cifar --teacher runs/teachers/resnet20 --data runs/data/cifar10 \
    --micro-batch-size 128 --view-patterns 2 --out runs/caches/resnet20
cache --kind images --preset cifar --teacher runs/teachers/resnet8 --data runs/data/cifar10 \
    --micro-batch-size 128 --view-patterns 2 --out runs/caches/resnet8
for teacher in resnet20_16 resnet8_16; do
    cache --kind images --preset cifar --teacher runs/teachers/$teacher --data runs/data/cifar10 \
        --train-size 16 --eval-resize 16 --eval-size 16 --micro-batch-size 128 --view-patterns 4 --out runs/caches/$teacher
done
