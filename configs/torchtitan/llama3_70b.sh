#!/usr/bin/env bash
# LLaMA 3 70B on 64 GPUs: FSDP 8 x TP 8.
#
# bash configs/torchtitan/llama3_70b.sh [any torchtitan option]
# NNODES, RDZV (host:port) and NGPU are torchrun's. The tokenizer is looked for in ./assets/hf, as by
# torchtitan's own config.
set -euo pipefail

exec torchrun --nnodes="${NNODES:-8}" --nproc-per-node="${NGPU:-8}" \
    --rdzv-backend=c10d --rdzv-endpoint="${RDZV:-localhost:29500}" \
    -m conda_dist.integrations.torchtitan.train \
    --module llama3 --config llama3_70b \
    --parallelism.data_parallel_shard_degree 8 \
    --parallelism.tensor_parallel_degree 8 \
    --optimizer.name conda --optimizer.lr 0.01 --optimizer.update_proj_gap 2000 \
    --optimizer.matmul_dtype bfloat16 "$@"
