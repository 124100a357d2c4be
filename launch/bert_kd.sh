#!/usr/bin/env bash
# BERT masked-language-model pretraining with a distillation window at its start (recipes/bert_kd.py).
#
#     deepspeed launch/bert_kd.sh [flags]                   all GPUs of this machine
#     deepspeed --hostfile hosts launch/bert_kd.sh [flags]  several machines
#     bash launch/bert_kd.sh [flags]                        sets up first, then as the first; NUM_GPUS=2 for two ranks
#
# Flags given there win over those below, and so does --preset as-released; --help lists all. launch/bert_baseline.sh is
# the same run without a teacher.
#
# To a shell the next line is a command that sets up, starts DeepSpeed on this file and never returns. To Python, which
# is how DeepSpeed runs this file on each rank, the same line is an unused string, and the program is what follows.
"eval" 'exec bash "$(dirname "$0")/env.sh" python3 -m kd_core.launch "$0" "$@"'  # fmt: skip

from kd_core.presets import launch
from recipes.bert_kd import Config, build_data, main

# BERT-base on C4 as in the paper; steps, batch, learning rate and optimizer are the recipe's defaults (the authors').
NODE = """
    --student base
    --data c4 --tokenizer google-bert/bert-base-uncased
    --teachers google-bert/bert-large-uncased google-bert/bert-base-uncased
    --kd-ratio 0.9     # authors' released code: 0.9 for the teacher, 0.1 for the labels
    --temperature 1    # authors' README: 1 generally works well
    --kd-stop 0.35     # the middle of the paper's 20 to 50 % of training
    --deepspeed-config zero1_bf16.json
    --compile
"""

# Two CPU cores, minutes: the same job in small, on the documentation that every Python installation carries.
SMALL = """
    --student tiny
    --data embedded --vocab-size 4096 --seq-len 64 --mask-fraction 0.3
    --kd-ratio 0.9 --temperature 1
    --kd-stop 1        # a run this short is all beginning: the window must outlast the plateau (recipes/results)
    --steps 600 --global-batch-size 64 --micro-batch-size 32
    --lr 2e-3 --clip 1 --dropout 0
    --deepspeed-config zero0_fp32_cpu.json
    --eval-every 100 --save-every 300 --log-every 20
"""
SMALL_TEACHER = """
    --student mini
    --mask-fraction 0.3
    --steps 900 --global-batch-size 64 --micro-batch-size 64
    --lr 1e-3 --clip 1 --dropout 0
    --deepspeed-config zero1_bf16.json
    --eval-every 150 --save-every 150 --log-every 30
"""

if __name__ == "__main__":
    launch(main, Config, build_data, node=NODE, small=SMALL, teacher=SMALL_TEACHER)
