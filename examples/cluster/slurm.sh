#!/usr/bin/env bash
# Qwen3-32B -> Qwen3-8B on two nodes of eight GPUs, from the root of the repository, which all nodes can read:
#   sbatch examples/cluster/slurm.sh
# The run stops by itself before the time limit, with a checkpoint. Submit the script again to continue it. You can
# submit it several times at once: with --dependency=singleton each job waits for the one before it and continues it.
#SBATCH --job-name=gsm8k_two_nodes
#SBATCH --dependency=singleton
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail

# shellcheck source=/dev/null
source .venv/bin/activate
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
ray get-auth-token --generate > /dev/null # once, in the home directory, which all nodes share

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_address=$(getent ahostsv4 "$head_node" | awk 'NR == 1 { print $1 }'):6379
srun --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    ray symmetric-run --address "$head_address" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    skd train --config gsm8k_two_nodes cluster.address="$head_address" run.max_hours=23.5 resume=auto "$@"
