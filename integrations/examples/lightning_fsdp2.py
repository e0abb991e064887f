"""Conda in Lightning, on FSDP2:

torchrun --nproc-per-node 2 integrations/examples/lightning_fsdp2.py
"""

import os
import sys

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from conda_dist import Conda, param_groups

STEPS, VOCABULARY, WIDTH, BATCH = 20, 64, 32, 16
FOLDER = sys.argv[1] if len(sys.argv) > 1 else "output"
RESUME = sys.argv[2] if len(sys.argv) > 2 else None  # a checkpoint of any number of ranks
RANKS = int(os.environ.get("WORLD_SIZE", 1))


class Module(lightning.LightningModule):
    """An embedding, two transformer layers and a head, which tell each token's successor."""

    def configure_model(self) -> None:
        """Makes and shards the model; Lightning calls this before configure_optimizers."""
        torch.manual_seed(0)
        layer, rest = nn.TransformerEncoderLayer, (4, 4 * WIDTH, 0.0)
        layers = [layer(WIDTH, *rest, batch_first=True) for _ in range(2)]
        ends = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.model = nn.Sequential(ends[0], *layers, ends[1])
        for module in (*layers, self.model):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Prints the mean loss of all ranks."""
        found = self.model(batch[0]).flatten(0, 1)
        loss = nn.functional.cross_entropy(found, (batch[0].flatten() + 1) % VOCABULARY)
        mean = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self.print(f"step {self.global_step} loss {mean:.3f}")
        return loss

    def configure_optimizers(self) -> Conda:
        """Embedding, head, norms and biases learn at lr * adamw_scale."""
        return Conda(param_groups(self), lr=1e-2, adamw_scale=0.5, update_proj_gap=10)


tokens = torch.randint(VOCABULARY, (BATCH, 16), generator=torch.Generator().manual_seed(0))
trainer = lightning.Trainer(
    max_steps=STEPS,
    strategy=ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=False),  # one file
    devices=RANKS,
    callbacks=ModelCheckpoint(FOLDER, "{step}", every_n_epochs=STEPS // 2, save_top_k=-1),
    logger=False,
    enable_progress_bar=False,
)
trainer.fit(Module(), DataLoader(TensorDataset(tokens), BATCH // RANKS), ckpt_path=RESUME)
