#!/usr/bin/env bash
# LLaMA 3 8B on 16 GPUs: HSDP, two replicas of FSDP 8.
#
# bash configs/torchtitan/llama3_8b_hsdp.sh [any torchtitan option]
# NNODES, RDZV (host:port) and NGPU are torchrun's. The tokenizer is looked for in ./assets/hf, as by
# torchtitan's own config.
set -euo pipefail

exec torchrun --nnodes="${NNODES:-2}" --nproc-per-node="${NGPU:-8}" \
    --rdzv-backend=c10d --rdzv-endpoint="${RDZV:-localhost:29500}" \
    -m conda_dist.integrations.torchtitan.train \
    --module llama3 --config llama3_8b \
    --parallelism.data_parallel_replicate_degree 2 \
    --parallelism.data_parallel_shard_degree 8 \
    --optimizer.name conda --optimizer.lr 0.01 --optimizer.update_proj_gap 2000 \
    --optimizer.matmul_dtype bfloat16 "$@"
