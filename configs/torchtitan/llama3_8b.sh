#!/usr/bin/env bash
# LLaMA 3 8B on 8 GPUs: FSDP 8.
# Planned (integrations/torchtitan/plan.py): 17.7 GiB of optimizer state a rank, 2.2 GiB sent a step.
#
# bash configs/torchtitan/llama3_8b.sh [any torchtitan option]; see run.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" 1 --module llama3 --config llama3_8b \
    --parallelism.data_parallel_shard_degree 8 \
    --optimizer.basis_budget 12884901888 \
    "$@"
