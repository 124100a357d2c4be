#!/usr/bin/env bash
# The studies at larger sizes, for one GPU, teachers included:
#     WIKI=wikipedia_en CIFAR=cifar10 TINY=tiny_imagenet32 bash recipes/results/gpu.sh
# The same call continues what was stopped, so it may be cut into pieces: WIKI=... timeout 590 bash recipes/results/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p runs/data
for link in "wikipedia=$WIKI" "cifar10=$CIFAR" "tiny_imagenet32=$TINY"; do
    ln -sfn "$(realpath "${link#*=}")" "runs/data/${link%%=*}"
done
for study in bert resnet tiny_imagenet; do
    bash launch/study.sh "recipes/results/gpu/$study.json" --out "recipes/results/gpu_$study"
done
bash launch/env.sh python3 recipes/results/tables.py
