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
finished='"stopped": "finished"'
for study in "$@"; do
    out=runs/gpu/$study
    if grep -qs "$finished" "$out/teacher/run.json" && [ ! -e "$out/teacher/hf" ]; then # its lines alone were brought here
        rm -r "$out/teacher"
        find "$out" -name run.json ! -exec grep -q "$finished" {} \; -printf '%h\0' | xargs -0r rm -r
    fi
    bash launch/study.sh "recipes/results/gpu/$study.json" --out "$out"
    to=recipes/results/gpu_$study
    mkdir -p "$to"
    (cd "$out" && find . -name study.json -o -name run.json -o -name metrics.jsonl | tar -c -T -) | tar -x -C "$to"
    rm -rf "$to/prepared"
    mkdir -p "$to/prepared/gpu/$study" # where the reports look for what the teacher cost
    mv "$to/teacher" "$to/prepared/gpu/$study"
done
bash launch/env.sh python3 recipes/results/tables.py
