#!/usr/bin/env bash
# The studies at larger sizes, for one GPU, teachers included; all three, or those named:
#     WIKI=wikipedia_en CIFAR=cifar10 TINY=tiny_imagenet32 bash recipes/results/gpu.sh [bert] [resnet] [tiny_imagenet]
# They run in runs/gpu/. The same call continues what was stopped, so it may be cut into pieces: timeout 500 bash ...
# The lines of a study that has finished go beside this file, for tables.py and the page.
set -euo pipefail
trap 'exit 143' TERM # once what runs has saved
[ $# -gt 0 ] || set -- bert resnet tiny_imagenet
need() { # the variable $1 names a folder
    [ -d "${!1:-}" ] || { echo "error: $1 must be the folder of ${2}, got '${!1:-}'; set it before this command" >&2 && exit 2; }
}
root=$(realpath "$(dirname "$0")/../..")
mkdir -p "$root/runs/data"
for study in "$@"; do
    case $study in
    bert) need WIKI "English Wikipedia" && data=$(realpath "$WIKI") name=wikipedia ;;
    resnet) need CIFAR "CIFAR-10" && data=$(realpath "$CIFAR") name=cifar10 ;;
    tiny_imagenet) need TINY "Tiny ImageNet" && data=$(realpath "$TINY") name=tiny_imagenet32 ;;
    *) echo "error: no study $study; choose bert, resnet or tiny_imagenet" >&2 && exit 2 ;;
    esac
    ln -sfnT "$data" "$root/runs/data/$name"
done
cd "$root"
for study in "$@"; do
    out=runs/gpu/$study to=recipes/results/gpu_$study
    bash launch/study.sh "recipes/results/gpu/$study.json" --out "$out"
    mkdir -p "$to"
    cp "$out/study.json" "$out/runs.json" "$out/runs.csv" "$to"
done
bash launch/env.sh python3 recipes/results/tables.py
