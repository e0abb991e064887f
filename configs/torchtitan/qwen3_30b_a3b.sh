#!/usr/bin/env bash
# Qwen3 30B-A3B, a mixture of experts, on 16 GPUs: FSDP 16, experts over 8.
# Planned (integrations/torchtitan/plan.py): 18.2 GiB of optimizer state a rank, 0.4 GiB sent a step.
#
# bash configs/torchtitan/qwen3_30b_a3b.sh [any torchtitan option]; see run.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" 2 --module qwen3 --config qwen3_30b_a3b \
    --parallelism.data_parallel_shard_degree 16 \
    --parallelism.expert_parallel_degree 8 \
    --training.disable_cuda_graphs \
    "$@"
