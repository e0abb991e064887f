"""Conda in Hugging Face's Trainer, on FSDP2; without torchrun, in one process:

torchrun --nproc-per-node 2 integrations/examples/huggingface_trainer.py
"""

import os
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from conda_dist.integrations.huggingface import conda_for_trainer

STEPS, VOCABULARY, WIDTH, BATCH = 20, 64, 32, 16
FOLDER = sys.argv[1] if len(sys.argv) > 1 else "output"
RESUME = sys.argv[2] if len(sys.argv) > 2 else None  # a checkpoint of any number of ranks
RANKS = int(os.environ.get("WORLD_SIZE", 1))

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
)
tokens = (torch.randint(VOCABULARY, (BATCH * STEPS, 1)) + torch.arange(16)) % VOCABULARY
args = TrainingArguments(
    FOLDER,
    learning_rate=1e-2,
    weight_decay=0.1,  # none for norms and biases
    max_steps=STEPS,
    per_device_train_batch_size=BATCH // RANKS,
    fsdp=RANKS > 1,  # leave it out for DDP
    fsdp_config={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    use_cpu=not torch.accelerator.is_available(),
    logging_steps=1,
    save_steps=STEPS // 2,
    report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(
    model,
    args,
    train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    optimizer_cls_and_kwargs=conda_for_trainer(args, adamw_scale=0.5, update_proj_gap=10),
)
trainer.train(resume_from_checkpoint=RESUME)
for line in trainer.state.log_history if trainer.is_world_process_zero() else ():
    if "loss" in line:
        print(f"step {line['step'] - 1} loss {line['loss']:.3f}")
