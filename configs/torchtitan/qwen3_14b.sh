#!/usr/bin/env bash
# Qwen3 14B on 16 GPUs: FSDP 8 x TP 2.
#
# bash configs/torchtitan/qwen3_14b.sh [any torchtitan option]; see run.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" 2 --module qwen3 --config qwen3_14b \
    --parallelism.data_parallel_shard_degree 8 \
    --parallelism.tensor_parallel_degree 2 \
    "$@"
