#!/usr/bin/env bash
# What the commands here share: bash configs/torchtitan/run.sh NODES [torchtitan options]
#
# NNODES, RDZV (host:port) and NGPU are torchrun's. The tokenizer is looked for in ./assets/hf, as by
# torchtitan's own configs. Options given later win.
set -euo pipefail

nodes=$1
shift
exec torchrun --nnodes="${NNODES:-$nodes}" --nproc-per-node="${NGPU:-8}" \
    --rdzv-backend=c10d --rdzv-endpoint="${RDZV:-localhost:29500}" \
    -m conda_dist.integrations.torchtitan.train \
    --optimizer.name conda --optimizer.lr 0.01 \
    --optimizer.matmul_dtype bfloat16 "$@"
