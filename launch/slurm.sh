#!/usr/bin/env bash
# Several nodes under Slurm: sbatch launch/slurm.sh [flags of the recipe], from the root of the repository on a shared
# disk. Edit the #SBATCH lines to your cluster (add --partition, --account) and the last line to your launch file.
# Two minutes (TERM@120, --grace-seconds 110) before the time limit, and when preempted, the run saves; a requeued job resumes.
#SBATCH --job-name=bert_kd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

bash launch/env.sh # once, before all nodes ask for it
out=runs/slurm-$SLURM_JOB_ID
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
mkdir -p runs
sed "s/\$/ slots=$SLURM_GPUS_ON_NODE/" <<<"$hosts" >"$out.hosts"
export LAUNCHER_ARGS="--hostfile=$out.hosts --no_ssh --master_addr=${hosts%%$'\n'*} --master_port=$((20000 + SLURM_JOB_ID % 10000))"
[ ! -d "$out" ] || set -- --resume "$@"

# One launcher a node, each told its number.
srun --kill-on-bad-exit=1 bash -c 'LAUNCHER_ARGS+=" --node_rank=$SLURM_NODEID" exec bash launch/bert_kd.sh "$@"' _ --out "$out" --grace-seconds 110 "$@"
