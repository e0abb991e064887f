#!/usr/bin/env bash
# Sets up .venv if need be and trains: bash launch/train.sh [CONFIG] [--section.key value ...]
#
# CONFIG defaults to configs/llama_tiny.toml; NPROC processes (default 2) run on this machine.
# Ctrl-C saves a checkpoint; the same command with --resume goes on from it.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" train

config=$(dirname "${BASH_SOURCE[0]}")/../configs/llama_tiny.toml
if [[ ${1-} == *.toml ]]; then
    config=$1
    shift
fi
# torchrun would report what is wrong at length, and with a code of its own.
python -m conda_dist.launch.pretrain "$config" "$@" --check
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Slurm's warning signal (SIGUSR1) stops the job, too, and a stopped job may take its time to save.
patience=$(python -m conda_dist.launch.cluster.launcher 300)  # nothing from a torchrun without it
exec torchrun --standalone --nproc-per-node="${NPROC:-2}" $patience \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m conda_dist.launch.pretrain "$config" "$@"
