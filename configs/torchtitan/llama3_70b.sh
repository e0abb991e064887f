#!/usr/bin/env bash
# LLaMA 3 70B on 64 GPUs: FSDP 8 x TP 8.
#
# bash configs/torchtitan/llama3_70b.sh [any torchtitan option]; see run.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" 8 --module llama3 --config llama3_70b \
    --parallelism.data_parallel_shard_degree 8 \
    --parallelism.tensor_parallel_degree 8 \
    "$@"
