"""Conda under DeepSpeed: torchrun --nproc-per-node 2 integrations/examples/deepspeed_zero.py.

A script that is called deepspeed.py would hide DeepSpeed from its own import.
"""

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import conda_dist.integrations.deepspeed  # noqa: F401 (It makes the type "Conda" known.)

STEPS, VOCABULARY, WIDTH = 20, 64, 32
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "zero_optimization": {"stage": 2},
    "optimizer": {
        "type": "Conda",  # was: "AdamW"
        "params": {"lr": 1e-2, "adamw_scale": 0.5, "update_proj_gap": 10},
    },
}


class Model(nn.Module):
    """An embedding, two transformer blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of telling each token's successor."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), (tokens.flatten() + 1) % 64)


torch.manual_seed(0)
model = Model()
# Embedding, head, norms and biases learn at lr * adamw_scale; decay is lr * weight_decay for all.
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)

torch.manual_seed(dist.get_rank())  # other tokens on each rank
for step in range(STEPS):
    loss = engine(torch.randint(VOCABULARY, (8, 16), device=engine.device))
    engine.backward(loss)
    engine.step()
    if dist.get_rank() == 0:
        print(f"step {step} loss {loss.item():.3f}")
dist.destroy_process_group()
