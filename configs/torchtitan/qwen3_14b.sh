#!/usr/bin/env bash
# Qwen3 14B on 16 GPUs: FSDP 8 x TP 2.
# Planned (integrations/torchtitan/plan.py): 26.7 GiB of optimizer state a rank, 2.3 GiB sent a step.
#
# bash configs/torchtitan/qwen3_14b.sh [any torchtitan option]; see run.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" 2 --module qwen3 --config qwen3_14b \
    --parallelism.data_parallel_shard_degree 8 \
    --parallelism.tensor_parallel_degree 2 \
    --optimizer.basis_budget 25769803776 \
    "$@"
