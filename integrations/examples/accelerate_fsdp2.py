"""Conda in Hugging Face's Accelerate, on FSDP2, with a model of transformers:

torchrun --nproc-per-node 2 integrations/examples/accelerate_fsdp2.py
"""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from transformers import LlamaConfig, LlamaForCausalLM

from conda_dist import Conda, param_groups

STEPS, VOCABULARY, WIDTH = 20, 64, 32

accelerator = Accelerator(
    fsdp_plugin=FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
)
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

# First make the optimizer: prepare() shards the model and gives the optimizer the shards.
# Embedding, head and norms learn at lr * adamw_scale; decay is lr * weight_decay for all.
optimizer = Conda(param_groups(model), lr=1e-2, adamw_scale=0.5, update_proj_gap=10)
model, optimizer = accelerator.prepare(model, optimizer)

torch.manual_seed(accelerator.process_index)  # other tokens on each rank
for step in range(STEPS):
    start = torch.randint(VOCABULARY, (8, 1), device=accelerator.device)
    tokens = (start + torch.arange(16, device=accelerator.device)) % VOCABULARY
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step} loss {loss.item():.3f}")
accelerator.end_training()
