"""Conda under DDP: torchrun --nproc-per-node 2 integrations/examples/ddp.py."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conda_dist import Conda, param_groups

STEPS, VOCABULARY, WIDTH = 20, 64, 32


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


dist.init_process_group()
device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
if device.type != "cpu":
    torch.accelerator.set_device_index(dist.get_node_local_rank())
torch.manual_seed(0)
model = DistributedDataParallel(Model().to(device))

# Embedding, head, norms and biases learn at lr * adamw_scale; decay is lr * weight_decay for all.
# With a process_group the ranks share the decompositions instead of each doing all.
optimizer = Conda(
    param_groups(model.module),
    lr=1e-2,
    adamw_scale=0.5,
    update_proj_gap=10,
    process_group=dist.group.WORLD,
)

torch.manual_seed(dist.get_rank())  # other tokens on each rank
for step in range(STEPS):
    loss = model(torch.randint(VOCABULARY, (8, 16), device=device))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step} loss {loss.item():.3f}")
dist.destroy_process_group()
