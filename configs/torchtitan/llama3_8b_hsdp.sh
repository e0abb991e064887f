#!/usr/bin/env bash
# LLaMA 3 8B on 16 GPUs: HSDP, two replicas of FSDP 8.
#
# bash configs/torchtitan/llama3_8b_hsdp.sh [any torchtitan option]; see run.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" 2 --module llama3 --config llama3_8b \
    --parallelism.data_parallel_replicate_degree 2 \
    --parallelism.data_parallel_shard_degree 8 \
    "$@"
