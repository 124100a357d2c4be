#!/usr/bin/env bash
# Benchmarks, interleaved in one process, as markdown tables:
#
#     ./launch/bench.sh kernels [flags]   the kernels against PyTorch (kd_core/kernels/bench.py)
#     ./launch/bench.sh linear [flags]    heads and losses in one against PyTorch (kd_core/kernels/bench_linear.py)
#     ./launch/bench.sh bert [flags]      the BERT recipe's step against a bare PyTorch loop, ZeRO 0 to 3, with teachers
#     ./launch/bench.sh causal [flags]    the causal language models' step against bare PyTorch loops, with a teacher
#     ./launch/bench.sh glue MODEL FOLDER the GLUE recipe's step against a bare PyTorch loop, and jobs at a time
#     ./launch/bench.sh resnet [flags]    the ResNet recipe's step against a bare PyTorch loop, with teachers
#     ./launch/bench.sh images [flags]    the image loader against torchvision's ImageFolder and DataLoader
set -euo pipefail
here=$(dirname "$0")
cd "$here/.."
what=${1:-}
case $what in
    kernels) module=kd_core.kernels.bench ;;
    linear) module=kd_core.kernels.bench_linear ;;
    bert) module=tests.benchmarks.bert_step ;;
    causal) module=tests.benchmarks.causal_step ;;
    glue) module=tests.benchmarks.glue_step ;;
    resnet) module=tests.benchmarks.resnet_step ;;
    images) module=tests.benchmarks.image_loader ;;
    *) echo "usage: launch/bench.sh kernels|linear|bert|causal|glue|resnet|images [flags]; --help after each lists its flags" >&2; exit 2 ;;
esac
exec bash launch/env.sh python3 -m "$module" "${@:2}"
