#!/usr/bin/env bash
# ResNet-50 on ImageNet with a teacher, to the end unless --kd-stop says otherwise (recipes/resnet_kd.py).
#
#     deepspeed launch/resnet50_kd.sh [flags]                   all GPUs of this machine
#     deepspeed --hostfile hosts launch/resnet50_kd.sh [flags]  several machines
#     bash launch/resnet50_kd.sh [flags]                        sets up first, then as the first; NUM_GPUS=2 for two ranks
#
# Flags given there win over those below, and so does --preset mild-36; --help lists all. The data comes from the hub,
# once you have accepted its terms (hf auth login), or from --data FOLDER. launch/resnet50_baseline.sh is the same run
# without a teacher.
#
# To a shell the next line is a command that sets up, starts DeepSpeed on this file and never returns. To Python, which
# is how DeepSpeed runs this file on each rank, the same line is an unused string, and the program is what follows.
"eval" 'exec bash "$(dirname "$0")/env.sh" python3 -m kd_core.launch "$0" "$@"'  # fmt: skip

from kd_core.presets import launch
from recipes.resnet_kd import Config, build_data, main

# Steps, batch, learning rate and augmentation are the recipe's defaults (the authors' 90 epochs).
NODE = """
    --student resnet50
    --data ILSVRC/imagenet-1k
    --teachers resnet101:IMAGENET1K_V1
    --kd-ratio 0.9     # authors' released code: 0.9 for the teacher, 0.1 for the labels
    --temperature 4    # authors' released code
    --lr-batch-size 2048
    --deepspeed-config zero1_bf16.json
    --compile
"""

# Two CPU cores, minutes: the same job in small, on CIFAR-10.
SMALL = """
    --preset cifar --data uoft-cs/cifar10
    --kd-ratio 0.9 --temperature 4
"""
SMALL_TEACHER = """
    --preset cifar --student resnet20
"""

if __name__ == "__main__":
    launch(main, Config, build_data, node=NODE, small=SMALL, teacher=SMALL_TEACHER)
