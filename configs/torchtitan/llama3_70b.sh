#!/usr/bin/env bash
# LLaMA 3 70B on 64 GPUs: FSDP 8 x TP 8.
# Planned (integrations/torchtitan/plan.py): 13.7 GiB of optimizer state a rank, 98 GiB sent a step.
# Bases are split, for all would take 95 GiB more, and gathered for every step; with a
# --optimizer.basis_budget of 128 GiB a step would send 3 GiB.
#
# bash configs/torchtitan/llama3_70b.sh [any torchtitan option]; see run.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" 8 --module llama3 --config llama3_70b \
    --parallelism.data_parallel_shard_degree 8 \
    --parallelism.tensor_parallel_degree 8 \
    "$@"
