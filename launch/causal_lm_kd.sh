#!/usr/bin/env bash
# Causal language models (Llama, Qwen, Gemma, GPT) distilled from larger ones (recipes/causal_lm_kd.py).
#
#     deepspeed launch/causal_lm_kd.sh [flags]                   all GPUs of this machine
#     deepspeed --hostfile hosts launch/causal_lm_kd.sh [flags]  several machines
#     bash launch/causal_lm_kd.sh [flags]                        sets up first, then as the first; NUM_GPUS=2 for two ranks
#     ... --preset responses --data DIALOGUES --student MODEL --teachers MODEL    on prompts and responses
#
# Flags given there win over those below, and so does --preset responses; --help lists all. launch/causal_lm_baseline.sh is
# the same run without a teacher.
#
# To a shell the next line is a command that sets up, starts DeepSpeed on this file and never returns. To Python, which
# is how DeepSpeed runs this file on each rank, the same line is an unused string, and the program is what follows.
"eval" 'exec bash "$(dirname "$0")/env.sh" python3 -m kd_core.launch "$0" "$@"'  # fmt: skip

from kd_core.presets import launch
from recipes.causal_lm_kd import Config, build_data, main

# A Llama of 135M parameters on C4 from two larger models of one tokenizer: 20,000 steps of 2^20 tokens. --student 360M likewise.
NODE = """
    --student 135M
    --data c4 --tokenizer HuggingFaceTB/SmolLM2-135M
    --teachers HuggingFaceTB/SmolLM2-360M HuggingFaceTB/SmolLM2-1.7B
    --kd-ratio 0.9 --temperature 1
    --kd-stop 0.35     # the middle of 20 to 50 % of training, as for BERT
    --deepspeed-config zero1_bf16.json
    --compile
"""

# One or two CPU cores, 12 minutes: the same job in small, on the documentation that every Python installation carries.
SMALL = """
    --student 2x128
    --data embedded --vocab-size 4096 --seq-len 128
    --kd-ratio 0.9 --temperature 1
    --kd-stop 0.35
    --steps 400 --global-batch-size 16 --micro-batch-size 16
    --lr 3e-3 --warmup-fraction 0.05
    --deepspeed-config zero0_fp32_cpu.json
    --eval-every 100 --save-every 200 --log-every 20
"""
SMALL_TEACHER = """
    --student 4x256
    --steps 500 --global-batch-size 16 --micro-batch-size 16
    --lr 2e-3 --warmup-fraction 0.05
    --deepspeed-config zero1_bf16.json
    --eval-every 150 --save-every 150 --log-every 30
"""

if __name__ == "__main__":
    launch(main, Config, build_data, node=NODE, small=SMALL, teacher=SMALL_TEACHER)
