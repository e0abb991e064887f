#!/usr/bin/env bash
# DeepSeek V3 671B on 256 GPUs: FSDP 256, experts over 64.
#
# bash configs/torchtitan/deepseek_v3_671b.sh [any torchtitan option]
# NNODES, RDZV (host:port) and NGPU are torchrun's. The tokenizer is looked for in ./assets/hf, as by
# torchtitan's own config.
set -euo pipefail

exec torchrun --nnodes="${NNODES:-32}" --nproc-per-node="${NGPU:-8}" \
    --rdzv-backend=c10d --rdzv-endpoint="${RDZV:-localhost:29500}" \
    -m conda_dist.integrations.torchtitan.train \
    --module deepseek_v3 --config deepseek_v3_671b \
    --parallelism.data_parallel_shard_degree 256 \
    --parallelism.expert_parallel_degree 64 \
    --optimizer.name conda --optimizer.lr 0.01 --optimizer.update_proj_gap 2000 \
    --optimizer.matmul_dtype bfloat16 "$@"
