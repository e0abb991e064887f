#!/usr/bin/env bash
# DeepSeek V3 671B on 256 GPUs: FSDP 256, experts over 64.
# Planned (integrations/torchtitan/plan.py): 39.6 GiB of optimizer state a rank, 0.3 GiB sent a step.
#
# bash configs/torchtitan/deepseek_v3_671b.sh [any torchtitan option]; see run.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" 32 --module deepseek_v3 --config deepseek_v3_671b \
    --parallelism.data_parallel_shard_degree 256 \
    --parallelism.expert_parallel_degree 64 \
    --optimizer.basis_budget 21474836480 \
    "$@"
