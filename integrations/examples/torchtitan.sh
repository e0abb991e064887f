#!/usr/bin/env bash
# Conda in torchtitan 0.3: NGPU=2 bash integrations/examples/torchtitan.sh [any torchtitan option]
#
# Start this in a checkout of torchtitan, which has the tokenizer and the text of its debug model.
# The switch is --optimizer.name. Embedding, head and norms learn at lr * adamw_scale.
set -euo pipefail

torchrun --standalone --nproc-per-node "${NGPU:-2}" \
    -m conda_dist.integrations.torchtitan.train \
    --module llama3 --config llama3_debugmodel \
    --optimizer.name conda --optimizer.lr 1e-2 \
    --optimizer.adamw_scale 0.5 --optimizer.update_proj_gap 5 \
    --lr_scheduler.warmup_steps 2 --training.steps 10 "$@"
