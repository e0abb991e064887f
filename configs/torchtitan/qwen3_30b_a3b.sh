#!/usr/bin/env bash
# Qwen3 30B-A3B, a mixture of experts, on 16 GPUs: FSDP 16, experts over 8.
#
# bash configs/torchtitan/qwen3_30b_a3b.sh [any torchtitan option]
# NNODES, RDZV (host:port) and NGPU are torchrun's. The tokenizer is looked for in ./assets/hf, as by
# torchtitan's own config.
set -euo pipefail

exec torchrun --nnodes="${NNODES:-2}" --nproc-per-node="${NGPU:-8}" \
    --rdzv-backend=c10d --rdzv-endpoint="${RDZV:-localhost:29500}" \
    -m conda_dist.integrations.torchtitan.train \
    --module qwen3 --config qwen3_30b_a3b \
    --parallelism.data_parallel_shard_degree 16 \
    --parallelism.expert_parallel_degree 8 \
    --training.disable_cuda_graphs \
    --optimizer.name conda --optimizer.lr 0.01 --optimizer.update_proj_gap 2000 \
    --optimizer.matmul_dtype bfloat16 "$@"
